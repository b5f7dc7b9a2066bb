// The library's plain C interface, called through ctypes, and how its work is shared out.
//
// The threads are OpenMP's, and in practice torch's own: a second pool beside it would fight it for the cores, since
// either keeps its idle threads spinning for a while. No dependency but the compiler.

#include <algorithm>

#include "product.h"

namespace {

// `format` counts FLOAT_FORMATS, then TILE_FORMATS.
const Format& format_of(int format) { return format < FLOATS ? FLOAT_FORMATS[format] : TILE_FORMATS[format - FLOATS]; }

// Work is shared out by weight rows, in pieces of about 64 Ki weights: long enough to outweigh the hand-over, short
// enough to end together; and whole tiles and groups of columns, since an expert's inner values are columns next.
int64_t piece_of(int64_t ins) {
    return std::max<int64_t>(GROUP, 65536 / std::max<int64_t>(ins, 1) / GROUP * GROUP);
}

void share(int threads, Work work, const Product& product) {
    const int64_t outs = product.outs, piece = piece_of(product.ins), pieces = (outs + piece - 1) / piece;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces > 1)
    for (int64_t i = 0; i < pieces; ++i) work(product, i * piece, std::min(outs, (i + 1) * piece));
}

// The part `part` of `parts` of some rows.
void round_part(const float* x, Rounded* rounded, int64_t rows, int64_t ins, int64_t part, int64_t parts) {
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    round_activations(x + first * ins, rounded + first * groups_of(ins), last - first, ins, 0, ins);
}

}  // namespace

extern "C" {

// y = x @ w.T. `rounded`: room for [rows, groups_of(ins)] where the format rounds.
void tierlm_linear(int threads, int format, const float* x, const void* w, const void* scale, float* y,
                   Rounded* rounded, int64_t rows, int64_t ins, int64_t outs, int64_t stride) {
    const Format& as = format_of(format);
    if (as.rounds) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows >= 4 * threads)
        for (int part = 0; part < threads; ++part) round_part(x, rounded, rows, ins, part, threads);
    }
    share(threads, as.outputs, {x, rounded, static_cast<const uint8_t*>(w), scale, y, rows, ins, outs, stride});
}

// y [outs, ins] = w as float32. Row 0 of `w` is the first of a block of scales, or of a tile.
void tierlm_widen(int threads, int format, const void* w, const void* scale, float* y, int64_t ins, int64_t outs) {
    const Work work = format_of(format).widened;
    share(threads, work, {nullptr, nullptr, static_cast<const uint8_t*>(w), scale, y, 0, ins, outs, 0});
}

// w [outs, ins] to the tiles of kernels/quantised.py: int4 if `four`, else int8.
void tierlm_quantise(int threads, int four, const float* w, uint8_t* data, uint16_t* scales, int64_t ins,
                     int64_t outs) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t row = 0; row < outs; row += LANES)
        quantised(w, data, scales, outs, ins, row, std::min(outs, row + LANES), four);
}

// One expert and the rows that chose it.
struct Expert {
    const float* x;  // [rows, hidden]
    const uint8_t *gate, *up, *down;
    const void *gate_scale, *up_scale, *down_scale;
    float *inner, *scratch;            // [rows, width] each
    Rounded *rounded, *inner_rounded;  // [rows, groups_of(hidden)] and [rows, groups_of(width)], or null
    float* y;                          // [rows, hidden]
    int64_t rows;
};

// y = down(silu(gate(x)) * up(x)) of several experts at once: the threads are woken once for all of them.
void tierlm_gated_mlps(int threads, int format, const Expert* experts, int64_t count, int64_t hidden, int64_t width) {
    const Format& as = format_of(format);
    const int64_t in_piece = piece_of(hidden), in_pieces = (width + in_piece - 1) / in_piece;
    const int64_t out_piece = piece_of(width), out_pieces = (hidden + out_piece - 1) / out_piece;
#pragma omp parallel num_threads(threads)
    {
        if (as.rounds) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count * threads; ++i) {
                const Expert& e = experts[i / threads];
                round_part(e.x, e.rounded, e.rows, hidden, i % threads, threads);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * in_pieces; ++i) {
            const Expert& e = experts[i / in_pieces];
            const int64_t first = i % in_pieces * in_piece, last = std::min(width, first + in_piece);
            as.outputs({e.x, e.rounded, e.gate, e.gate_scale, e.inner, e.rows, hidden, width, width}, first, last);
            as.outputs({e.x, e.rounded, e.up, e.up_scale, e.scratch, e.rows, hidden, width, width}, first, last);
            for (int64_t row = 0; row < e.rows; ++row)
                gated(e.inner + row * width + first, e.scratch + row * width + first, last - first);
            if (as.rounds) round_activations(e.inner, e.inner_rounded, e.rows, width, first, last);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * out_pieces; ++i) {
            const Expert& e = experts[i / out_pieces];
            const int64_t first = i % out_pieces * out_piece, last = std::min(hidden, first + out_piece);
            const Product down{e.inner, e.inner_rounded, e.down, e.down_scale, e.y, e.rows, width, hidden, hidden};
            as.outputs(down, first, last);
        }
    }
}

// The two halves of kv_b in absorbed attention, w [heads, per_head, rank] as stored, for `group` heads from `head` on.
// In tiles, `nope` and `value` are multiples of 8, and the format is one that does not round.

// into: q [rows, group, nope], with these strides in floats -> latent [group, rows, rank]; a head's first `nope` rows.
void tierlm_into_latent(int threads, int format, const float* q, const uint8_t* w, const void* scale, float* latent,
                        int64_t rows, int64_t head, int64_t group, int64_t nope, int64_t per_head, int64_t rank,
                        int64_t row_stride, int64_t head_stride) {
    const Work work = format_of(format).weighted_rows;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < group; ++h) {
        const int64_t first = (head + h) * per_head;
        const float* x = q + h * head_stride;
        work({x, nullptr, w, scale, latent + h * rows * rank, rows, rank, 0, row_stride}, first, first + nope);
    }
}

// out of: mixed [group, rows, rank] -> y [rows, group, value]; a head's last `value` rows.
void tierlm_from_latent(int threads, int format, const float* mixed, const uint8_t* w, const void* scale, float* y,
                        int64_t rows, int64_t head, int64_t group, int64_t value, int64_t per_head, int64_t rank) {
    const Work work = format_of(format).outputs;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < group; ++h) {
        const int64_t last = (head + h + 1) * per_head, first = last - value;
        const float* x = mixed + h * rows * rank;
        work({x, nullptr, w, scale, y + h * value, rows, rank, 0, group * value, first}, first, last);
    }
}

}
