// Multi-head latent attention for a few tokens in one parallel region, including the norms before and after.
// Projections are absorbed: queries in the latent space are multiplied with the cache directly (DeepSeek-V2,
// arXiv 2405.04434, section 2.1). models/latent.py does the same in torch.

#include "attention.h"

#include "../layout.h"

namespace {

struct Attention {
    Matrix query_a, query_b, key_value_a;  // query_a is zeros if queries have one projection
    // Zeros in value_b: key_value_b holds the keys and the values of each head. Else it holds keys only, transposed.
    Matrix key_value_b, value_b, output;
    Matrix norm, query_norm, latent_norm, next_norm;            // vectors
    int64_t heads, nope, rope, value, interleaved;
    int64_t cache_format;   // index into FLOAT_FORMATS: float32 or bfloat16
    uint8_t* cache;         // this layer's [capacity, rank + rope]
    const int64_t* places;  // [rows, 2] cache row where the token's sequence begins, and the token's position in it
    const float *cosine, *sine;  // [rows, rope / 2]
    const float* hidden;         // [rows, hidden]
    float *sum, *normed;         // [rows, hidden] hidden + attention, and its norm
    int64_t rows;
};

}  // namespace

LAYOUT(Attention, FIELD(query_a), FIELD(query_b), FIELD(key_value_a), FIELD(key_value_b), FIELD(value_b), FIELD(output), FIELD(norm),
       FIELD(query_norm), FIELD(latent_norm), FIELD(next_norm), FIELD(heads), FIELD(nope), FIELD(rope), FIELD(value),
       FIELD(interleaved), FIELD(cache_format), FIELD(cache), FIELD(places), FIELD(cosine), FIELD(sine),
       FIELD(hidden), FIELD(sum), FIELD(normed), FIELD(rows))

// One thread computes each output in a fixed order: results depend only on the operands.
extern "C" void tierlm_attention(int threads, const Attention* call, double eps, double inner_eps, double scale) {
    const Attention& a = *call;
    const int64_t rows = a.rows, hidden = a.norm.ins, rank = a.latent_norm.ins, latent = rank + a.rope;
    const int64_t query_width = a.nope + a.rope, per_head = a.nope + a.value;
    const int64_t low_rank = a.query_a.outs;  // 0 if queries have one projection
    const Format& cached = FLOAT_FORMATS[a.cache_format];
    const int64_t item = a.cache_format == 0 ? 4 : 2;
    const bool split = a.value_b.data != nullptr;
    const Matrix from_latent = (split ? a.value_b : a.key_value_b).exact();
    const int64_t values_per_head = split ? a.value : per_head;
    const auto norm = floats_of(a.norm), query_norm = floats_of(a.query_norm), latent_norm = floats_of(a.latent_norm);
    const auto next_norm = floats_of(a.next_norm);
    const auto lows = room<float>(rows * low_rank), queries = room<float>(rows * a.heads * query_width);
    const auto steps = room<float>(rows * latent), appended = room<float>(rows * latent);
    const auto projected = room<float>(rows * hidden);
    Input x(rows, hidden), low_x(rows, low_rank), attended(rows, a.heads * a.value);
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; ++row) longest = std::max(longest, a.places[2 * row + 1] + 1);
    // Heads per unit of work; they share reads of the cache.
    const int64_t group = std::max<int64_t>(1, std::min<int64_t>(4, a.heads * rows / threads));
    const int64_t groups = (a.heads + group - 1) / group;

    together(threads, [&](Team& team) {
        for (const int64_t row : team.share(rows)) {
            normalised(a.hidden + row * hidden, norm.get(), x.row(row), hidden, eps);
            x.round(row);
        }
        if (low_rank) {
            compute(team, {x.times(a.query_a, lows.get(), rows), x.times(a.key_value_a, steps.get(), rows)});
        } else {
            compute(team, {x.times(a.query_b, queries.get(), rows), x.times(a.key_value_a, steps.get(), rows)});
        }
        for (const int64_t row : team.share(rows)) {
            if (low_rank) {
                const float* found = lows.get() + row * low_rank;
                normalised(found, query_norm.get(), low_x.row(row), low_rank, inner_eps);
                low_x.round(row);
            }
            const float* raw = steps.get() + row * latent;
            float* step = appended.get() + row * latent;
            normalised(raw, latent_norm.get(), step, rank, inner_eps);
            const int64_t angle = row * a.rope / 2;
            rotated(raw + rank, a.cosine + angle, a.sine + angle, step + rank, a.rope / 2, a.interleaved);
            uint8_t* to = a.cache + (a.places[2 * row] + a.places[2 * row + 1]) * latent * item;
            append(step, to, latent, item);
        }
        if (low_rank) compute(team, {low_x.times(a.query_b, queries.get(), rows)});
        const auto query = room<float>(group * latent), mixed = room<float>(group * latent);
        const auto scores = room<float>(group * longest);
        for (const int64_t i : team.share(rows * groups)) {
            const int64_t row = i / groups, first = i % groups * group, count = std::min(group, a.heads - first);
            const int64_t keys = a.places[2 * row + 1] + 1, angle = row * a.rope / 2;
            const uint8_t* past = a.cache + a.places[2 * row] * latent * item;
            const Matrix b = split ? a.key_value_b.exact() : a.key_value_b;
            for (int64_t h = 0; h < count; ++h) {
                const float* q = queries.get() + (row * a.heads + first + h) * query_width;
                float* to = query.get() + h * latent;
                const int64_t at = (first + h) * (split ? rank : per_head);
                Product into_latent = b.times(q, nullptr, to, 1);
                into_latent.origin = at;
                if (split) {
                    b.as().outputs(into_latent, at, at + rank);
                } else {
                    b.as().weighted_rows(into_latent, at, at + a.nope);
                }
                rotated(q + a.nope, a.cosine + angle, a.sine + angle, to + rank, a.rope / 2, a.interleaved);
            }
            cached.outputs({query.get(), nullptr, past, nullptr, scores.get(), count, latent, keys, keys}, 0, keys);
            for (int64_t h = 0; h < count; ++h) softmax(scores.get() + h * keys, keys, scale);
            float* sums = mixed.get();
            cached.weighted_rows({scores.get(), nullptr, past, nullptr, sums, count, latent, keys, keys}, 0, keys);
            for (int64_t h = 0; h < count; ++h) {
                const int64_t last = (first + h + 1) * values_per_head, begin = last - a.value;
                float* y = attended.row(row) + (first + h) * a.value;
                Product values = from_latent.times(sums + h * latent, nullptr, y, 1);
                values.origin = begin;
                from_latent.as().outputs(values, begin, last);
            }
        }
        for (const int64_t row : team.share(rows)) attended.round(row);
        compute(team, {attended.times(a.output, projected.get(), rows)});
        for (const int64_t row : team.share(rows)) {
            for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) a.sum[i] = a.hidden[i] + projected[i];
            normalised(a.sum + row * hidden, next_norm.get(), a.normed + row * hidden, hidden, eps);
        }
    });
}
