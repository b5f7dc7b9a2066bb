// Each token's keys and values are read once for up to four query heads.

#include "heads.h"

#include <algorithm>
#include <cstring>

#include "cached.h"
#include "vectors.h"

namespace {

typedef float Quad __attribute__((vector_size(LANES * 2)));

// In pairs: a chain of LANES sums would take longer than the product of a short head.
INLINE float sum(Floats v) {
    Quad halves[2];
    std::memcpy(halves, &v, sizeof v);
    const Quad quad = halves[0] + halves[1];
    return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

template <class Stored, int HEADS>
struct Scores {
    static INLINE void run(const SharedHead& a, int64_t head, float* scores) {
        const float* queries = a.queries + head * a.dim;
        for (int64_t t = 0; t < a.tokens; ++t) {
            const uint8_t* key = a.keys + t * a.pitch;
            Floats even[HEADS] = {}, odd[HEADS] = {};
            float rest[HEADS] = {};
            int64_t i = 0;
            for (; i + 2 * LANES <= a.dim; i += 2 * LANES) {
                const Floats first = Stored::load(key + i * Stored::size);
                const Floats second = Stored::load(key + (i + LANES) * Stored::size);
                for (int h = 0; h < HEADS; ++h) {
                    const float* q = queries + h * a.dim + i;
                    even[h] += first * *reinterpret_cast<const Floats*>(q);
                    odd[h] += second * *reinterpret_cast<const Floats*>(q + LANES);
                }
            }
            for (; i < a.dim; ++i)
                for (int h = 0; h < HEADS; ++h) rest[h] += Stored::one(key + i * Stored::size) * queries[h * a.dim + i];
            for (int h = 0; h < HEADS; ++h) {
                scores[(head + h) * a.tokens + t] = sum(even[h] + odd[h]) + rest[h];
            }
        }
    }
};

// Adds COUNT tokens' values, starting at `t`, in order.
template <class Stored, int HEADS, int COUNT>
INLINE void add(const SharedHead& a, int64_t head, int64_t t, const float* weights, float* mixed) {
    float factors[HEADS][COUNT];
    for (int h = 0; h < HEADS; ++h)
        for (int k = 0; k < COUNT; ++k) factors[h][k] = weights[(head + h) * a.tokens + t + k];
    const uint8_t* values = a.values + t * a.pitch;
    float* to = mixed + head * a.dim;
    int64_t i = 0;
    for (; i + LANES <= a.dim; i += LANES) {
        Floats value[COUNT];
        for (int k = 0; k < COUNT; ++k) value[k] = Stored::load(values + k * a.pitch + i * Stored::size);
        for (int h = 0; h < HEADS; ++h) {
            Floats sum = *reinterpret_cast<Floats*>(to + h * a.dim + i);
            for (int k = 0; k < COUNT; ++k) sum += value[k] * factors[h][k];
            *reinterpret_cast<Floats*>(to + h * a.dim + i) = sum;
        }
    }
    for (; i < a.dim; ++i)
        for (int h = 0; h < HEADS; ++h)
            for (int k = 0; k < COUNT; ++k)
                to[h * a.dim + i] += Stored::one(values + k * a.pitch + i * Stored::size) * factors[h][k];
}

template <class Stored, int HEADS>
struct Values {
    static INLINE void run(const SharedHead& a, int64_t head, const float* weights, float* mixed) {
        std::fill(mixed + head * a.dim, mixed + (head + HEADS) * a.dim, 0.0f);
        int64_t t = 0;
        for (; t + 4 <= a.tokens; t += 4) add<Stored, HEADS, 4>(a, head, t, weights, mixed);
        for (; t < a.tokens; ++t) add<Stored, HEADS, 1>(a, head, t, weights, mixed);
    }
};

// Runs Work<Stored, HEADS> over all heads, four at a time.
template <template <class, int> class Work, class Stored, class... Rest>
INLINE void each_head(const SharedHead& a, Rest... rest) {
    int64_t head = 0;
    for (; head + 4 <= a.heads; head += 4) Work<Stored, 4>::run(a, head, rest...);
    for (; head + 2 <= a.heads; head += 2) Work<Stored, 2>::run(a, head, rest...);
    if (head < a.heads) Work<Stored, 1>::run(a, head, rest...);
}

CLONES void scores_float32(const SharedHead& a, float* scores) { each_head<Scores, Float32>(a, scores); }
CLONES void scores_bfloat16(const SharedHead& a, float* scores) { each_head<Scores, BFloat16>(a, scores); }
CLONES void values_float32(const SharedHead& a, const float* weights, float* mixed) {
    each_head<Values, Float32>(a, weights, mixed);
}
CLONES void values_bfloat16(const SharedHead& a, const float* weights, float* mixed) {
    each_head<Values, BFloat16>(a, weights, mixed);
}

}  // namespace

void head_scores(const SharedHead& shared, bool half, float* scores) {
    (half ? scores_bfloat16 : scores_float32)(shared, scores);
}

void head_values(const SharedHead& shared, bool half, const float* weights, float* mixed) {
    (half ? values_bfloat16 : values_float32)(shared, weights, mixed);
}
