// Grouped-query attention for a few tokens in one parallel region, including the norms before and after.
// models/grouped.py does the same in torch.
//
// The tokens that a query sees are cut into ranges, whose sums are merged in order (FlashDecoding, Dao et al. 2023). The
// cut depends on their number only, so results do not depend on the threads or on other sequences.

#include <cmath>

#include "../layout.h"
#include "attention.h"
#include "heads.h"

namespace {

constexpr int64_t RANGE = 256;   // least tokens of a range, but for the last
constexpr int64_t RANGES = 16;  // most ranges of a query

struct Grouped {
    Matrix query, key, value, output;
    // Vectors, null if absent.
    Matrix norm, query_norm, key_norm, output_norm, next_norm, query_bias, key_bias, value_bias, output_bias, sinks;
    int64_t heads, kv_heads, dim;
    int64_t rotated;       // dimensions of a head, its first
    int64_t interleaved;   // rotated pairs are neighbours
    int64_t whole_norm;    // query_norm and key_norm are of all heads together
    int64_t zero_centred;  // norms are stored less one
    int64_t window;        // tokens that a query sees; 0: all
    int64_t cache_format;  // 0: float32, 1: bfloat16
    uint8_t* cache;        // this layer's [capacity, 2 * kv_heads * dim]: keys, then values
    const int64_t* places;  // [rows, 2] cache row where the token's sequence begins, and the token's position in it
    const float *cosine, *sine;  // [rows, rotated / 2]
    const float* hidden;         // [rows, hidden]
    float *sum, *normed;         // [rows, hidden] hidden + attention, and its norm
    int64_t rows;
};

// The tokens that the query of one row sees.
struct Sight {
    int64_t first, tokens;  // cache row of the first
    int64_t range;          // tokens of a range

    Sight(const Grouped& a, int64_t row) {
        const int64_t end = a.places[2 * row + 1] + 1;
        tokens = a.window ? std::min(a.window, end) : end;
        first = a.places[2 * row] + end - tokens;
        range = (tokens + RANGE * RANGES - 1) / (RANGE * RANGES) * RANGE;
    }
    int64_t ranges() const { return (tokens + range - 1) / range; }
};

void add(float* x, const float* bias, int64_t count) {
    if (!bias) return;
    for (int64_t i = 0; i < count; ++i) x[i] += bias[i];
}

std::unique_ptr<float[]> norm_of(const Matrix& vector, bool zero_centred) {
    auto found = floats_of(vector);
    if (zero_centred && found)
        for (int64_t i = 0; i < vector.ins; ++i) found[i] += 1.0f;
    return found;
}

// Queries or keys of one row, normed and rotated. Overwrites x [heads, dim].
void turn(const Grouped& a, int64_t row, float* x, float* y, int64_t heads, const float* norm, float eps) {
    const int64_t angle = row * a.rotated / 2;
    if (norm && a.whole_norm) normalised(x, norm, x, heads * a.dim, eps);
    for (int64_t h = 0; h < heads; ++h, x += a.dim, y += a.dim) {
        if (norm && !a.whole_norm) normalised(x, norm, x, a.dim, eps);
        rotated(x, a.cosine + angle, a.sine + angle, y, a.rotated / 2, a.interleaved);
        std::copy(x + a.rotated, x + a.dim, y + a.rotated);
    }
}

}  // namespace

LAYOUT(Grouped, FIELD(query), FIELD(key), FIELD(value), FIELD(output), FIELD(norm), FIELD(query_norm), FIELD(key_norm),
       FIELD(output_norm), FIELD(next_norm), FIELD(query_bias), FIELD(key_bias), FIELD(value_bias), FIELD(output_bias),
       FIELD(sinks), FIELD(heads), FIELD(kv_heads), FIELD(dim), FIELD(rotated), FIELD(interleaved), FIELD(whole_norm),
       FIELD(zero_centred), FIELD(window), FIELD(cache_format), FIELD(cache), FIELD(places), FIELD(cosine), FIELD(sine),
       FIELD(hidden), FIELD(sum), FIELD(normed), FIELD(rows))

// One thread computes each output in a fixed order: results depend only on the operands.
extern "C" void tierlm_grouped_attention(int threads, const Grouped* call, double eps, double scale) {
    const Grouped& a = *call;
    const int64_t rows = a.rows, hidden = a.norm.ins, dim = a.dim, sharing = a.heads / a.kv_heads;
    const int64_t query_width = a.heads * dim, key_width = a.kv_heads * dim, cached = 2 * key_width;
    const bool half = a.cache_format != 0;
    const int64_t item = half ? 2 : 4;
    const auto norm = norm_of(a.norm, a.zero_centred), next_norm = norm_of(a.next_norm, a.zero_centred);
    const auto query_norm = norm_of(a.query_norm, a.zero_centred), key_norm = norm_of(a.key_norm, a.zero_centred);
    const auto output_norm = norm_of(a.output_norm, a.zero_centred);
    const auto query_bias = floats_of(a.query_bias), key_bias = floats_of(a.key_bias);
    const auto value_bias = floats_of(a.value_bias), output_bias = floats_of(a.output_bias);
    const auto sinks = floats_of(a.sinks);
    int64_t ranges = 0, range = 0;  // most of a row, and the longest
    for (int64_t row = 0; row < rows; ++row) {
        const Sight sight(a, row);
        ranges = std::max(ranges, sight.ranges());
        range = std::max(range, std::min(sight.range, sight.tokens));
    }
    const auto raw = room<float>(rows * query_width), queries = room<float>(rows * query_width);
    const auto raw_keys = room<float>(rows * key_width), values = room<float>(rows * key_width);
    const auto keys = room<float>(rows * key_width), projected = room<float>(rows * hidden);
    // [rows, ranges, heads]: the largest score, the sum of exponentials, and the values weighted by them
    const auto peaks = room<float>(rows * ranges * a.heads), sums = room<float>(rows * ranges * a.heads);
    const auto mixed = room<float>(rows * ranges * query_width);
    Input x(rows, hidden), attended(rows, query_width);

    together(threads, [&](Team& team) {
        for (const int64_t row : team.share(rows)) {
            normalised(a.hidden + row * hidden, norm.get(), x.row(row), hidden, eps);
            x.round(row);
        }
        compute(team, {x.times(a.query, raw.get(), rows), x.times(a.key, raw_keys.get(), rows),
                 x.times(a.value, values.get(), rows)});
        for (const int64_t row : team.share(rows)) {
            float *query = raw.get() + row * query_width, *key = raw_keys.get() + row * key_width;
            float *turned = keys.get() + row * key_width, *value = values.get() + row * key_width;
            add(query, query_bias.get(), query_width);
            add(key, key_bias.get(), key_width);
            add(value, value_bias.get(), key_width);
            turn(a, row, query, queries.get() + row * query_width, a.heads, query_norm.get(), eps);
            turn(a, row, key, turned, a.kv_heads, key_norm.get(), eps);
            uint8_t* to = a.cache + (a.places[2 * row] + a.places[2 * row + 1]) * cached * item;
            append(turned, to, key_width, item);
            append(value, to + key_width * item, key_width, item);
        }
        const auto scores = room<float>(sharing * range);
        for (const int64_t i : team.share(ranges * a.kv_heads * rows)) {  // rows of a sequence share reads of the cache
            const int64_t at = i / (a.kv_heads * rows), kv = i / rows % a.kv_heads, row = i % rows;
            const Sight sight(a, row);
            const int64_t begin = at * sight.range, tokens = std::min(sight.range, sight.tokens - begin);
            if (tokens <= 0) continue;
            const uint8_t* past = a.cache + ((sight.first + begin) * cached + kv * dim) * item;
            const float* query = queries.get() + row * query_width + kv * sharing * dim;
            const SharedHead shared = {query, past, past + key_width * item, sharing, tokens, dim, cached * item};
            const int64_t place = (row * ranges + at) * a.heads + kv * sharing;
            head_scores(shared, half, scores.get());
            for (int64_t h = 0; h < sharing; ++h) {
                float* mine = scores.get() + h * tokens;
                peaks[place + h] = largest(mine, tokens);
                sums[place + h] = exponentials(mine, tokens, peaks[place + h], scale);
            }
            head_values(shared, half, scores.get(), mixed.get() + place * dim);
        }
        for (const int64_t i : team.share(rows * a.heads)) {
            const int64_t row = i / a.heads, head = i % a.heads, count = Sight(a, row).ranges();
            const auto place = [&](int64_t at) { return (row * ranges + at) * a.heads + head; };
            float peak = sinks ? sinks[head] : -INFINITY;
            for (int64_t at = 0; at < count; ++at) peak = std::max(peak, static_cast<float>(scale) * peaks[place(at)]);
            float total = sinks ? std::exp(sinks[head] - peak) : 0.0f;
            float* y = attended.row(row) + head * dim;
            std::fill(y, y + dim, 0.0f);
            for (int64_t at = 0; at < count; ++at) {
                const float share = std::exp(static_cast<float>(scale) * peaks[place(at)] - peak);
                const float* part = mixed.get() + place(at) * dim;
                total += share * sums[place(at)];
                for (int64_t d = 0; d < dim; ++d) y[d] += share * part[d];
            }
            for (int64_t d = 0; d < dim; ++d) y[d] /= total;
        }
        for (const int64_t row : team.share(rows)) attended.round(row);
        compute(team, {attended.times(a.output, projected.get(), rows)});
        for (const int64_t row : team.share(rows)) {
            float *added = projected.get() + row * hidden, *sum = a.sum + row * hidden;
            add(added, output_bias.get(), hidden);
            if (output_norm) normalised(added, output_norm.get(), added, hidden, eps);
            for (int64_t i = 0; i < hidden; ++i) sum[i] = a.hidden[row * hidden + i] + added[i];
            normalised(sum, next_norm.get(), a.normed + row * hidden, hidden, eps);
        }
    });
}
