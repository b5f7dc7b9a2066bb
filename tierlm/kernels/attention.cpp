// Multi-head latent attention for a few tokens in one parallel region, including the norms before and after.
// Projections are absorbed: queries in the latent space are multiplied with the cache directly (DeepSeek-V2,
// arXiv 2405.04434, section 2.1). models/latent.py does the same in torch.
//
// Heads share the latents: they are the queries of a tile (flash.h). A query's tokens are cut into ranges, whose
// sums are merged in order; the cut depends on their number only.

#include "attention.h"

#include "../layout.h"
#include "ranges.h"

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

LAYOUT(Attention, FIELD(query_a), FIELD(query_b), FIELD(key_value_a), FIELD(key_value_b), FIELD(value_b),
       FIELD(output), FIELD(norm), FIELD(query_norm), FIELD(latent_norm), FIELD(next_norm), FIELD(heads),
       FIELD(nope), FIELD(rope), FIELD(value), FIELD(interleaved), FIELD(cache_format), FIELD(cache),
       FIELD(places), FIELD(cosine), FIELD(sine), FIELD(hidden), FIELD(sum), FIELD(normed), FIELD(rows))

// One thread computes each output in a fixed order: results depend only on the operands.
extern "C" void tierlm_attention(int threads, const Attention* call, double eps, double inner_eps, double scale) {
    const Attention& a = *call;
    const int64_t rows = a.rows, hidden = a.norm.ins, rank = a.latent_norm.ins, latent = rank + a.rope;
    const int64_t query_width = a.nope + a.rope, per_head = a.nope + a.value;
    const int64_t low_rank = a.query_a.outs;  // 0 if queries have one projection
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
    const auto latent_queries = room<float>(rows * a.heads * latent);
    const Flash& flash = Flash::of(a.cache_format != 0, latent % 2 == 0);
    const int64_t tiles = (a.heads + QUERIES - 1) / QUERIES, packed_bytes = Flash::packed_bytes(latent);
    const auto packed = room<uint8_t>(rows * tiles * packed_bytes);
    int64_t ranges = 0;  // most of a row
    for (int64_t row = 0; row < rows; ++row) ranges = std::max(ranges, Ranges(a.places[2 * row + 1] + 1).count());
    Parts parts(rows * tiles, ranges, rank);

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
        for (const int64_t i : team.share(rows * a.heads)) {
            const int64_t row = i / a.heads, head = i % a.heads, angle = row * a.rope / 2;
            const Matrix b = split ? a.key_value_b.exact() : a.key_value_b;
            const float* q = queries.get() + i * query_width;
            float* to = latent_queries.get() + i * latent;
            const int64_t at = head * (split ? rank : per_head);
            Product into_latent = b.times(q, nullptr, to, 1);
            into_latent.origin = at;
            if (split) {
                b.as().outputs(into_latent, at, at + rank);
            } else {
                b.as().weighted_rows(into_latent, at, at + a.nope);
            }
            rotated(q + a.nope, a.cosine + angle, a.sine + angle, to + rank, a.rope / 2, a.interleaved);
        }
        for (const int64_t i : team.share(rows * tiles)) {
            const int64_t row = i / tiles, first = i % tiles * QUERIES, count = std::min(QUERIES, a.heads - first);
            const float* query = latent_queries.get() + (row * a.heads + first) * latent;
            flash.pack(query, count, latent, 1, latent, static_cast<float>(scale), packed.get() + i * packed_bytes);
        }
        for (const int64_t i : team.share(ranges * rows * tiles)) {  // rows of a sequence share reads of the cache
            const int64_t at = i / (rows * tiles), tile = i % (rows * tiles), row = tile / tiles;
            const Ranges cut(a.places[2 * row + 1] + 1);
            if (at >= cut.count()) continue;
            const uint8_t* past = a.cache + (a.places[2 * row] + cut.first(at)) * latent * item;
            const Run run = {past, past, latent * item, latent * item, cut.tokens(at), latent, rank};
            const Seen part = parts.of(tile, at);
            part.clear(rank);
            attend(flash, packed.get() + tile * packed_bytes, run, Sight::all(run.tokens), part);
        }
        const auto mixed = room<float>(rank);
        for (const int64_t i : team.share(rows * a.heads)) {
            const int64_t row = i / a.heads, head = i % a.heads, tile = row * tiles + head / QUERIES;
            parts.merge(tile, Ranges(a.places[2 * row + 1] + 1).count(), head % QUERIES, -INFINITY, mixed.get());
            const int64_t last = (head + 1) * values_per_head, begin = last - a.value;
            Product values = from_latent.times(mixed.get(), nullptr, attended.row(row) + head * a.value, 1);
            values.origin = begin;
            from_latent.as().outputs(values, begin, last);
        }
        for (const int64_t row : team.share(rows)) attended.round(row);
        compute(team, {attended.times(a.output, projected.get(), rows)});
        for (const int64_t row : team.share(rows)) {
            for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) a.sum[i] = a.hidden[i] + projected[i];
            normalised(a.sum + row * hidden, next_norm.get(), a.normed + row * hidden, hidden, eps);
        }
    });
}
