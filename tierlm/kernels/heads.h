// Query heads that share one head of keys and values, over a run of tokens in a cache.
#pragma once

#include <cstdint>

struct SharedHead {
    const float* queries;          // [heads, dim]
    const uint8_t *keys, *values;  // of the first token; tokens are `pitch` bytes apart
    int64_t heads, tokens, dim, pitch;
};

// Both take a cache of float32, or of bfloat16 if `half`, and sum in an order that depends on sizes only.

// scores [heads, tokens] = queries . keys
void head_scores(const SharedHead& shared, bool half, float* scores);

// mixed [heads, dim] = sum over tokens of weights [heads, tokens] * values
void head_values(const SharedHead& shared, bool half, const float* weights, float* mixed);
