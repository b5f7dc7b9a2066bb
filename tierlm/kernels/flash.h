// Attention of a tile of queries to a run of tokens, in one pass over their keys and values: blocks of tokens that
// stay in cache, and an online softmax (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, Dao et al.,
// arXiv 2205.14135).
//
// Queries are the lanes of vectors. Sums have a fixed order that depends on sizes only.
#pragma once

#include <cstdint>

constexpr int64_t QUERIES = 16;      // of a tile
constexpr int64_t TOKENS = 128;      // of a block
constexpr float UNSEEN = -1e30f;     // the score of a key that a query does not see

// Keys and values of consecutive tokens. Pitches are bytes from one token to the next.
struct Run {
    const uint8_t *keys, *values;
    int64_t key_pitch, value_pitch, tokens, key_dim, value_dim;
};

// The tokens of a run that each query sees: `first` to `last`.
struct Sight {
    int64_t first[QUERIES], last[QUERIES];

    static Sight all(int64_t tokens) {
        Sight sight = {};
        for (int64_t& last : sight.last) last = tokens;
        return sight;
    }
};

// What a tile has seen so far: the largest score, the sum of exponentials, and the values weighted by them.
struct Seen {
    float *peaks, *sums;  // [QUERIES]
    float* mixed;         // [QUERIES, value_dim]

    void clear(int64_t value_dim) const;
};

// The arithmetic on float32, or on bfloat16 if `half`: then processors with AVX-512 BF16 round queries and weights to
// bfloat16, as keys and values are, and sum in float32.
struct Flash {
    // Rounds and packs `count` rows of `dim` values, times `scale`, as lanes; missing lanes are zero. Strides are in
    // floats. `packed` has room for packed_bytes(dim).
    void (*pack)(const float* rows, int64_t count, int64_t row_stride, int64_t stride, int64_t dim, float scale,
                 void* packed);
    // sums [tokens, QUERIES] = packed rows . tokens' rows of `dim` values
    void (*dots)(const void* packed, const uint8_t* tokens, int64_t pitch, int64_t count, int64_t dim, float* sums);
    // Adds one block, of scores [tokens, QUERIES], to what was seen. Overwrites scores.
    void (*add)(float* scores, const uint8_t* values, int64_t pitch, int64_t count, int64_t dim, const Seen& seen);

    // Stores `outs` sums of each of `count` tokens, [count, QUERIES], as float32 or rounded; y rows are `pitch`
    // bytes apart.
    void (*store)(const float* sums, int64_t count, int64_t outs, uint8_t* y, int64_t pitch);

    static int64_t packed_bytes(int64_t dim) { return (dim + 1) / 2 * 2 * QUERIES * 4; }
    // `even`: whether all dimensions of keys are.
    static const Flash& of(bool half, bool even);
};

// Adds the tokens of `run` to what the tile of packed `queries` has seen.
void attend(const Flash& flash, const void* queries, const Run& run, const Sight& sight, const Seen& seen);

// The kernels by AVX-512 and AVX-512 BF16; null: not on this processor.
const Flash* flash_avx512(bool half);
