// The tokens that a query sees, cut into ranges that threads share, and their sums (FlashDecoding, Dao et al. 2023).
#pragma once

#include <algorithm>
#include <cmath>

#include "flash.h"
#include "team.h"

struct Ranges {
    static constexpr int64_t MOST = 16;  // ranges of a query

    explicit Ranges(int64_t tokens)
        : tokens_(tokens), range_((tokens + TOKENS * MOST - 1) / (TOKENS * MOST) * TOKENS) {}
    int64_t count() const { return (tokens_ + range_ - 1) / range_; }
    int64_t first(int64_t at) const { return at * range_; }
    int64_t tokens(int64_t at) const { return std::min(range_, tokens_ - first(at)); }

   private:
    int64_t tokens_, range_;
};

// What each range of each tile's queries has seen.
class Parts {
   public:
    Parts(int64_t tiles, int64_t ranges, int64_t value_dim)
        : ranges_(ranges), dim_(value_dim), peaks_(room<float>(tiles * ranges * QUERIES)),
          sums_(room<float>(tiles * ranges * QUERIES)), mixed_(room<float>(tiles * ranges * QUERIES * value_dim)) {}

    Seen of(int64_t tile, int64_t range) const {
        const int64_t at = (tile * ranges_ + range) * QUERIES;
        return {peaks_.get() + at, sums_.get() + at, mixed_.get() + at * dim_};
    }
    // y [value_dim] = the attention of one query to its first `count` ranges, in order. `sink`: one more logit;
    // -infinity: none.
    void merge(int64_t tile, int64_t count, int64_t query, float sink, float* y) const {
        float peak = std::max(UNSEEN, sink);
        for (int64_t range = 0; range < count; ++range) peak = std::max(peak, of(tile, range).peaks[query]);
        float total = std::exp(sink - peak);
        std::fill(y, y + dim_, 0.0f);
        for (int64_t range = 0; range < count; ++range) {
            const Seen part = of(tile, range);
            const float share = std::exp(part.peaks[query] - peak);
            total += share * part.sums[query];
            for (int64_t d = 0; d < dim_; ++d) y[d] += share * part.mixed[query * dim_ + d];
        }
        for (int64_t d = 0; d < dim_; ++d) y[d] /= total;
    }

   private:
    int64_t ranges_, dim_;
    std::unique_ptr<float[]> peaks_, sums_, mixed_;
};
