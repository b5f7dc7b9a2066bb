// Attention of a chunk of new tokens to all tokens of their sequence, in tiles (flash.h), without a matrix of scores.
//
// One thread computes each output in a fixed order: results depend only on the operands.

#include <cmath>

#include "../layout.h"
#include "attention.h"
#include "ranges.h"

namespace {

constexpr int64_t TOGETHER = 8;  // that share reads of a block

struct Chunk {  // queries of one sequence; those of a token share keys and values
    const float* queries;         // [groups, tokens * sharing, key_dim]
    const uint8_t *keys, *values;  // of the sequence's first token and the first group; the next is `group` bytes on
    const float* sinks;           // [groups * sharing], or null
    float* out;                   // [groups, tokens * sharing, value_dim]
    int64_t cache_format, pitch, key_group, value_group;
    int64_t groups, sharing, key_dim, value_dim;
    int64_t past, tokens;  // tokens before these, and these
    int64_t window;        // tokens that a query sees; 0: all
};

struct LatentChunk {
    const float* queries;  // [tokens, heads, nope + rope]
    // float32 kv_b of each head: values of a head, an output and a latent are these strides apart.
    const float *to_keys, *to_values;
    int64_t key_head, key_out, key_in, value_head, value_out, value_in;
    const uint8_t* cache;  // of the sequence's first token, [past + tokens, rank + rope]
    float* out;            // [tokens, all_heads, value]: of the first of these heads
    int64_t cache_format, heads, all_heads, nope, rope, rank, value, past, tokens;
};

int64_t tiles_of(int64_t count) { return (count + QUERIES - 1) / QUERIES; }

// Several tiles' results, and their queries.
class Tiles {
   public:
    Tiles(const Flash& flash, int64_t count, int64_t key_dim, int64_t value_dim)
        : flash_(flash), key_dim_(key_dim), value_dim_(value_dim),
          packed_(room<uint8_t>(count * Flash::packed_bytes(key_dim))), parts_(count, 1, value_dim) {}

    void begin(int64_t tile, const float* queries, int64_t count, int64_t stride, float scale) {
        flash_.pack(queries, count, stride, 1, key_dim_, scale, packed(tile));
        parts_.of(tile, 0).clear(value_dim_);
    }
    void add(int64_t tile, const Run& run, const Sight& sight) {
        attend(flash_, packed(tile), run, sight, parts_.of(tile, 0));
    }
    void end(int64_t tile, int64_t query, float sink, float* y) const { parts_.merge(tile, 1, query, sink, y); }

   private:
    const Flash& flash_;
    int64_t key_dim_, value_dim_;
    std::unique_ptr<uint8_t[]> packed_;
    Parts parts_;

    uint8_t* packed(int64_t tile) const { return packed_.get() + tile * Flash::packed_bytes(key_dim_); }
};

// What `sharing` queries of each token see, from query `first` on, of tokens from `start` on.
Sight causal(int64_t first, int64_t count, int64_t sharing, int64_t past, int64_t window, int64_t start) {
    Sight sight;
    for (int64_t lane = 0; lane < QUERIES; ++lane) {
        const int64_t end = past + (first + std::min(lane, count - 1)) / sharing + 1;
        sight.first[lane] = window ? std::max<int64_t>(0, end - window - start) : 0;
        sight.last[lane] = std::max<int64_t>(0, end - start);
    }
    return sight;
}

// One new token. Threads share its ranges, as in attention.cpp.
void attend_one(int threads, const Chunk& a, const Flash& flash, float scale) {
    const int64_t seen = a.window ? std::min(a.window, a.past + 1) : a.past + 1, begin = a.past + 1 - seen;
    const int64_t tiles = tiles_of(a.sharing), packed_bytes = Flash::packed_bytes(a.key_dim);
    const auto packed = room<uint8_t>(a.groups * tiles * packed_bytes);
    const Ranges cut(seen);
    const Parts parts(a.groups * tiles, cut.count(), a.value_dim);
    together(threads, [&](Team& team) {
        for (const int64_t i : team.share(a.groups * tiles)) {
            const int64_t group = i / tiles, first = i % tiles * QUERIES, count = std::min(QUERIES, a.sharing - first);
            const float* query = a.queries + (group * a.sharing + first) * a.key_dim;
            flash.pack(query, count, a.key_dim, 1, a.key_dim, scale, packed.get() + i * packed_bytes);
        }
        for (const int64_t i : team.share(cut.count() * a.groups * tiles)) {
            const int64_t at = i / (a.groups * tiles), tile = i % (a.groups * tiles), group = tile / tiles;
            const int64_t start = begin + cut.first(at);
            const Run run = {a.keys + group * a.key_group + start * a.pitch,
                             a.values + group * a.value_group + start * a.pitch,
                             a.pitch, a.pitch, cut.tokens(at), a.key_dim, a.value_dim};
            const Seen part = parts.of(tile, at);
            part.clear(a.value_dim);
            attend(flash, packed.get() + tile * packed_bytes, run, Sight::all(run.tokens), part);
        }
        for (const int64_t i : team.share(a.groups * a.sharing)) {
            const int64_t query = i % a.sharing, tile = i / a.sharing * tiles + query / QUERIES;
            const float sink = a.sinks ? a.sinks[i] : -INFINITY;
            parts.merge(tile, cut.count(), query % QUERIES, sink, a.out + i * a.value_dim);
        }
    });
}

// Outputs of a latent: rows of a matrix, packed in tiles.
class Expansion {
   public:
    Expansion(const Flash& flash, int64_t outs, int64_t ins)
        : flash_(flash), outs_(outs), ins_(ins), packed_(room<uint8_t>(tiles_of(outs) * Flash::packed_bytes(ins))) {}

    void pack(const float* rows, int64_t row_stride, int64_t stride) {
        for (int64_t first = 0; first < outs_; first += QUERIES)
            flash_.pack(rows + first * row_stride, std::min(QUERIES, outs_ - first), row_stride, stride, ins_, 1.0f,
                        at(first));
    }
    // y [count, outs], rows `width` values apart, for latents `pitch` bytes apart.
    void run(const uint8_t* latents, int64_t pitch, int64_t count, uint8_t* y, int64_t width, int64_t item) const {
        alignas(64) float sums[TOKENS * QUERIES];
        for (int64_t first = 0; first < outs_; first += QUERIES) {
            flash_.dots(at(first), latents, pitch, count, ins_, sums);
            flash_.store(sums, count, std::min(QUERIES, outs_ - first), y + first * item, width * item);
        }
    }

   private:
    const Flash& flash_;
    int64_t outs_, ins_;
    std::unique_ptr<uint8_t[]> packed_;

    uint8_t* at(int64_t first) const { return packed_.get() + first / QUERIES * Flash::packed_bytes(ins_); }
};

}  // namespace

LAYOUT(Chunk, FIELD(queries), FIELD(keys), FIELD(values), FIELD(sinks), FIELD(out), FIELD(cache_format), FIELD(pitch),
       FIELD(key_group), FIELD(value_group), FIELD(groups), FIELD(sharing), FIELD(key_dim), FIELD(value_dim),
       FIELD(past), FIELD(tokens), FIELD(window))
LAYOUT(LatentChunk, FIELD(queries), FIELD(to_keys), FIELD(to_values), FIELD(key_head), FIELD(key_out), FIELD(key_in),
       FIELD(value_head), FIELD(value_out), FIELD(value_in), FIELD(cache), FIELD(out), FIELD(cache_format),
       FIELD(heads), FIELD(all_heads), FIELD(nope), FIELD(rope), FIELD(rank), FIELD(value), FIELD(past), FIELD(tokens))

extern "C" {

// Queries with cached keys and values.
void tierlm_chunk(int threads, const Chunk* call, double scale) {
    const Chunk& a = *call;
    const int64_t queries = a.tokens * a.sharing, tiles = tiles_of(queries), shares = (tiles + TOGETHER - 1) / TOGETHER;
    const Flash& flash = Flash::of(a.cache_format != 0, a.key_dim % 2 == 0);
    if (a.tokens == 1) return attend_one(threads, a, flash, static_cast<float>(scale));
    together(threads, [&](Team& team) {
        Tiles work(flash, TOGETHER, a.key_dim, a.value_dim);
        for (const int64_t i : team.share(a.groups * shares)) {
            const int64_t group = i % a.groups, share = shares - 1 - i / a.groups;  // the longest first
            const int64_t begin = share * TOGETHER * QUERIES, end = std::min(queries, begin + TOGETHER * QUERIES);
            for (int64_t q = begin; q < end; q += QUERIES) {
                const float* query = a.queries + (group * queries + q) * a.key_dim;
                const int64_t count = std::min(QUERIES, queries - q);
                work.begin((q - begin) / QUERIES, query, count, a.key_dim, static_cast<float>(scale));
            }
            const int64_t last = a.past + (end - 1) / a.sharing + 1;
            const int64_t first = a.window ? std::max<int64_t>(0, a.past + begin / a.sharing + 1 - a.window) : 0;
            for (int64_t start = first / TOKENS * TOKENS; start < last; start += TOKENS) {
                const Run run = {a.keys + group * a.key_group + start * a.pitch,
                                 a.values + group * a.value_group + start * a.pitch,
                                 a.pitch, a.pitch, std::min(TOKENS, last - start), a.key_dim, a.value_dim};
                for (int64_t q = begin; q < end; q += QUERIES) {
                    const int64_t count = std::min(QUERIES, queries - q);
                    work.add((q - begin) / QUERIES, run, causal(q, count, a.sharing, a.past, a.window, start));
                }
            }
            for (int64_t q = begin; q < end; ++q) {
                const float sink = a.sinks ? a.sinks[group * a.sharing + q % a.sharing] : -INFINITY;
                float* y = a.out + (group * queries + q) * a.value_dim;
                work.end((q - begin) / QUERIES, (q - begin) % QUERIES, sink, y);
            }
        }
    });
}

// Keys and values of one head at a time are expanded from the latents, a block of tokens at a time, which stays in
// cache for all queries.
void tierlm_latent_chunk(int threads, const LatentChunk* call, double scale) {
    const LatentChunk& a = *call;
    const int64_t width = a.nope + a.rope, latent = a.rank + a.rope, item = a.cache_format == 0 ? 4 : 2;
    const int64_t tiles = tiles_of(a.tokens), end = a.past + a.tokens, stride = a.heads * width;
    const Flash& flash = Flash::of(item == 2, width % 2 == 0 && a.rank % 2 == 0);
    together(threads, [&](Team& team) {
        Tiles work(flash, tiles, width, a.value);
        Expansion to_keys(flash, a.nope, a.rank), to_values(flash, a.value, a.rank);
        const auto keys = room<uint8_t>(TOKENS * width * item), values = room<uint8_t>(TOKENS * a.value * item);
        for (const int64_t head : team.share(a.heads)) {
            to_keys.pack(a.to_keys + head * a.key_head, a.key_out, a.key_in);
            to_values.pack(a.to_values + head * a.value_head, a.value_out, a.value_in);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const float* query = a.queries + tile * QUERIES * stride + head * width;
                const int64_t count = std::min(QUERIES, a.tokens - tile * QUERIES);
                work.begin(tile, query, count, stride, static_cast<float>(scale));
            }
            for (int64_t start = 0; start < end; start += TOKENS) {
                const int64_t count = std::min(TOKENS, end - start);
                const uint8_t* latents = a.cache + start * latent * item;
                to_keys.run(latents, latent * item, count, keys.get(), width, item);
                to_values.run(latents, latent * item, count, values.get(), a.value, item);
                for (int64_t t = 0; t < count; ++t)
                    std::memcpy(keys.get() + (t * width + a.nope) * item, latents + (t * latent + a.rank) * item,
                                a.rope * item);
                const Run run = {keys.get(), values.get(), width * item, a.value * item, count, width, a.value};
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t first = tile * QUERIES;
                    work.add(tile, run, causal(first, std::min(QUERIES, a.tokens - first), 1, a.past, 0, start));
                }
            }
            for (int64_t q = 0; q < a.tokens; ++q)
                work.end(q / QUERIES, q % QUERIES, -INFINITY, a.out + (q * a.all_heads + head) * a.value);
        }
    });
}

}
