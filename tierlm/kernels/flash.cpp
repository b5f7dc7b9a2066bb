#include "flash.h"

#include <algorithm>

#include "attention.h"
#include "cached.h"
#include "exponential.h"

namespace {

constexpr int HALVES = QUERIES / LANES;
constexpr int64_t WIDENED = 256;  // dimensions of a few tokens that are widened at a time

INLINE Floats& at(float* p) { return *reinterpret_cast<Floats*>(p); }
INLINE const Floats& at(const float* p) { return *reinterpret_cast<const Floats*>(p); }

void pack(const float* rows, int64_t count, int64_t row_stride, int64_t stride, int64_t dim, float scale,
          void* packed) {
    auto* to = static_cast<float*>(packed);
    std::fill(to, to + dim * QUERIES, 0.0f);
    for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t d = 0; d < dim; ++d) to[d * QUERIES + lane] = rows[lane * row_stride + d * stride] * scale;
}

template <int64_t ITEM>
void store(const float* sums, int64_t count, int64_t outs, uint8_t* y, int64_t pitch) {
    for (int64_t t = 0; t < count; ++t) append(sums + t * QUERIES, y + t * pitch, outs, ITEM);
}

template <class Stored, int COUNT>
INLINE void dots_of(const float* queries, const uint8_t* tokens, int64_t pitch, int64_t dim, float* sums) {
    Floats found[COUNT][HALVES] = {};
    for (int64_t start = 0; start < dim; start += WIDENED) {
        const int64_t width = std::min(WIDENED, dim - start);
        float wide[COUNT][WIDENED + LANES];  // rows in different banks of the cache
        for (int k = 0; k < COUNT; ++k) {
            const uint8_t* row = tokens + k * pitch + start * Stored::size;
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES) at(wide[k] + i) = Stored::load(row + i * Stored::size);
            for (; i < width; ++i) wide[k][i] = Stored::one(row + i * Stored::size);
        }
        for (int64_t i = 0; i < width; ++i) {
            const float* query = queries + (start + i) * QUERIES;
            for (int k = 0; k < COUNT; ++k)
                for (int half = 0; half < HALVES; ++half) found[k][half] += at(query + half * LANES) * wide[k][i];
        }
    }
    for (int k = 0; k < COUNT; ++k)
        for (int half = 0; half < HALVES; ++half) at(sums + k * QUERIES + half * LANES) = found[k][half];
}

template <class Stored>
INLINE void dots(const void* packed, const uint8_t* tokens, int64_t pitch, int64_t count, int64_t dim, float* sums) {
    const auto* queries = static_cast<const float*>(packed);
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) dots_of<Stored, 4>(queries, tokens + t * pitch, pitch, dim, sums + t * QUERIES);
    for (; t < count; ++t) dots_of<Stored, 1>(queries, tokens + t * pitch, pitch, dim, sums + t * QUERIES);
}

// Turns scores into weights and updates peaks and sums. `factors`: of what was seen before.
INLINE void weigh(float* scores, int64_t count, const Seen& seen, float* factors) {
    for (int half = 0; half < HALVES; ++half) {
        float* lane = scores + half * LANES;
        const Floats before = at(seen.peaks + half * LANES);
        Floats peak = before, sum = {};
        for (int64_t t = 0; t < count; ++t) peak = at(lane + t * QUERIES) > peak ? at(lane + t * QUERIES) : peak;
        for (int64_t t = 0; t < count; ++t) {
            const Floats score = at(lane + t * QUERIES);  // NaN is not unseen
            const Floats weight = score <= UNSEEN ? Floats{} : exponential(score - peak);
            at(lane + t * QUERIES) = weight;
            sum += weight;
        }
        const Floats factor = exponential(before - peak);
        at(factors + half * LANES) = factor;
        at(seen.peaks + half * LANES) = peak;
        at(seen.sums + half * LANES) = at(seen.sums + half * LANES) * factor + sum;
    }
}

template <class Stored>
INLINE void add(float* scores, const uint8_t* values, int64_t pitch, int64_t count, int64_t dim, const Seen& seen) {
    constexpr int SOME = 4;
    float factors[QUERIES];
    weigh(scores, count, seen, factors);
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) {
        for (int query = 0; query < QUERIES; query += SOME) {
            Floats sums[SOME][2];
            for (int k = 0; k < SOME; ++k)
                for (int half = 0; half < 2; ++half)
                    sums[k][half] = at(seen.mixed + (query + k) * dim + d + half * LANES) * factors[query + k];
            for (int64_t t = 0; t < count; ++t) {
                const uint8_t* value = values + t * pitch + d * Stored::size;
                const Floats low = Stored::load(value), high = Stored::load(value + LANES * Stored::size);
                for (int k = 0; k < SOME; ++k) {
                    const float weight = scores[t * QUERIES + query + k];
                    sums[k][0] += low * weight;
                    sums[k][1] += high * weight;
                }
            }
            for (int k = 0; k < SOME; ++k)
                for (int half = 0; half < 2; ++half)
                    at(seen.mixed + (query + k) * dim + d + half * LANES) = sums[k][half];
        }
    }
    for (; d < dim; ++d) {
        for (int query = 0; query < QUERIES; ++query) {
            float sum = seen.mixed[query * dim + d] * factors[query];
            for (int64_t t = 0; t < count; ++t)
                sum += Stored::one(values + t * pitch + d * Stored::size) * scores[t * QUERIES + query];
            seen.mixed[query * dim + d] = sum;
        }
    }
}

CLONES void dots_float32(const void* packed, const uint8_t* tokens, int64_t pitch, int64_t count, int64_t dim,
                         float* sums) {
    dots<Float32>(packed, tokens, pitch, count, dim, sums);
}
CLONES void dots_bfloat16(const void* packed, const uint8_t* tokens, int64_t pitch, int64_t count, int64_t dim,
                          float* sums) {
    dots<BFloat16>(packed, tokens, pitch, count, dim, sums);
}
CLONES void add_float32(float* scores, const uint8_t* values, int64_t pitch, int64_t count, int64_t dim,
                        const Seen& seen) {
    add<Float32>(scores, values, pitch, count, dim, seen);
}
CLONES void add_bfloat16(float* scores, const uint8_t* values, int64_t pitch, int64_t count, int64_t dim,
                         const Seen& seen) {
    add<BFloat16>(scores, values, pitch, count, dim, seen);
}

const Flash FLOAT32 = {pack, dots_float32, add_float32, store<4>};
const Flash BFLOAT16 = {pack, dots_bfloat16, add_bfloat16, store<2>};

}  // namespace

void Seen::clear(int64_t value_dim) const {
    std::fill(peaks, peaks + QUERIES, UNSEEN);
    std::fill(sums, sums + QUERIES, 0.0f);
    std::fill(mixed, mixed + QUERIES * value_dim, 0.0f);
}

const Flash& Flash::of(bool half, bool even) {
    const Flash* fast = half && !even ? nullptr : flash_avx512(half);
    return fast ? *fast : half ? BFLOAT16 : FLOAT32;
}

void attend(const Flash& flash, const void* queries, const Run& run, const Sight& sight, const Seen& seen) {
    const int64_t first = *std::min_element(sight.first, sight.first + QUERIES);
    const int64_t latest = *std::max_element(sight.first, sight.first + QUERIES);  // all queries see from here
    const int64_t earliest = *std::min_element(sight.last, sight.last + QUERIES);  // up to here
    const int64_t last = std::min(run.tokens, *std::max_element(sight.last, sight.last + QUERIES));
    alignas(64) float scores[TOKENS * QUERIES];
    for (int64_t start = std::max<int64_t>(first, 0) / TOKENS * TOKENS; start < last; start += TOKENS) {
        const int64_t count = std::min(TOKENS, last - start);
        flash.dots(queries, run.keys + start * run.key_pitch, run.key_pitch, count, run.key_dim, scores);
        if (start < latest || start + count > earliest) {
            for (int64_t i = 0; i < count * QUERIES; ++i) {
                const int64_t t = start + i / QUERIES, lane = i % QUERIES;
                if (t < sight.first[lane] || t >= sight.last[lane]) scores[i] = UNSEEN;
            }
        }
        flash.add(scores, run.values + start * run.value_pitch, run.value_pitch, count, run.value_dim, seen);
    }
}
