// The library's C interface, called through ctypes. Depends on nothing but the compiler.

#include "../layout.h"
#include "activations.h"
#include "team.h"

namespace {

// Calls `work` for all rows of the matrix, piece by piece.
void share(Team& team, Work work, const Matrix& matrix, const Product& product) {
    const int64_t piece = matrix.piece();
    for (const int64_t i : team.share(matrix.pieces()))
        work(product, i * piece, std::min(matrix.outs, (i + 1) * piece));
}

// Rounds part `part` of `parts` of the rows.
void round_part(const float* x, Rounded* rounded, int64_t rows, int64_t ins, int64_t part, int64_t parts) {
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    round_activations(x + first * ins, rounded + first * groups_of(ins), last - first, ins, 0, ins);
}

}  // namespace

LAYOUT(Matrix, FIELD(format), FIELD(data), FIELD(scale), FIELD(outs), FIELD(ins), FIELD(extra))

extern "C" {

// y = x @ w.T
void tierlm_linear(int threads, const Matrix* w, const float* x, float* y, int64_t rows, int64_t stride) {
    const bool rounds = w->as().rounds;
    const auto rounded = room<Rounded>(rounds ? rows * groups_of(w->ins) : 0);
    Product product = w->times(x, rounded.get(), y, rows);
    product.stride = stride;
    const int64_t parts = rounds ? std::max<int64_t>(1, std::min<int64_t>(threads, rows / 4)) : 0;
    together(w->pieces() > 1 || parts > 1 ? threads : 1, [&](Team& team) {
        for (const int64_t part : team.share(parts)) round_part(x, rounded.get(), rows, w->ins, part, parts);
        share(team, w->as().outputs, *w, product);
    });
}

// Whether products of any number of rows are faster than torch's.
int tierlm_fast(const Matrix* w) {
    return w->as().rounds || (w->format < FLOATS && float_outputs_avx512());
}

// y [outs, ins] = w as float32. Row 0 of `w` begins a block of scales or a tile.
void tierlm_widen(int threads, const Matrix* w, float* y) {
    together(w->pieces() > 1 ? threads : 1,
             [&](Team& team) { share(team, w->as().widened, *w, w->times(nullptr, nullptr, y, 0)); });
}

// Quantises w [outs, ins] to the tiles of formats/tiles.py: int4 if `four`, else int8.
void tierlm_quantise(int threads, int four, const float* w, uint8_t* data, uint16_t* scales, int64_t ins,
                     int64_t outs) {
    together(threads, [&](Team& team) {
        for (const int64_t tile : team.share((outs + LANES - 1) / LANES))
            quantised(w, data, scales, outs, ins, tile * LANES, std::min(outs, (tile + 1) * LANES), four);
    });
}

// One expert and its rows.
struct Expert {
    const float* x;  // [rows, hidden]
    Matrix gate, up, down;
    float* y;  // [rows, hidden]
    int64_t rows;
};
LAYOUT(Expert, FIELD(x), FIELD(gate), FIELD(up), FIELD(down), FIELD(y), FIELD(rows))

// An expert with its intermediate buffers.
struct Inside : Expert {
    float *inner, *scratch;            // [rows, width] each
    Rounded *rounded, *inner_rounded;  // [rows, groups_of(hidden)] and [rows, groups_of(width)], null if not needed
};

// y = down(silu(gate(x)) * up(x)) for several experts in one parallel region.
void tierlm_gated_mlps(int threads, const Expert* given, int64_t count) {
    int64_t in_pieces = 0, out_pieces = 0, floats = 0, groups = 0;
    const auto outer_groups = [](const Expert& e) {
        return e.gate.as().rounds || e.up.as().rounds ? groups_of(e.gate.ins) : 0;
    };
    const auto inner_groups = [](const Expert& e) { return e.down.as().rounds ? groups_of(e.down.ins) : 0; };
    for (int64_t i = 0; i < count; ++i) {
        const Expert& e = given[i];
        in_pieces += e.gate.pieces();
        out_pieces += e.down.pieces();
        floats += 2 * e.rows * e.gate.outs;
        groups += e.rows * (outer_groups(e) + inner_groups(e));
    }
    const auto experts = room<Inside>(count);
    const auto values = room<float>(floats);
    const auto rounded = room<Rounded>(groups);
    float* value = values.get();
    Rounded* group = rounded.get();
    for (int64_t i = 0; i < count; ++i) {
        const Expert& e = given[i];
        const int64_t size = e.rows * e.gate.outs;
        const int64_t outer = e.rows * outer_groups(e), inner = e.rows * inner_groups(e);
        experts[i] = {e, value, value + size, outer ? group : nullptr, inner ? group + outer : nullptr};
        value += 2 * size;
        group += outer + inner;
    }
    together(threads, [&](Team& team) {
        for (const int64_t i : team.share(count * threads)) {
            const Inside& e = experts[i / threads];
            if (e.rounded) round_part(e.x, e.rounded, e.rows, e.gate.ins, i % threads, threads);
        }
        for (const int64_t i : team.share(in_pieces)) {
            const Inside* e = experts.get();
            int64_t at = i;
            for (; at >= e->gate.pieces(); ++e) at -= e->gate.pieces();
            const int64_t width = e->gate.outs, first = at * e->gate.piece();
            const int64_t last = std::min(width, first + e->gate.piece());
            e->gate.as().outputs(e->gate.times(e->x, e->rounded, e->inner, e->rows), first, last);
            e->up.as().outputs(e->up.times(e->x, e->rounded, e->scratch, e->rows), first, last);
            for (int64_t row = 0; row < e->rows; ++row)
                gated(e->inner + row * width + first, e->scratch + row * width + first, last - first);
            if (e->inner_rounded) round_activations(e->inner, e->inner_rounded, e->rows, width, first, last);
        }
        for (const int64_t i : team.share(out_pieces)) {
            const Inside* e = experts.get();
            int64_t at = i;
            for (; at >= e->down.pieces(); ++e) at -= e->down.pieces();
            const int64_t first = at * e->down.piece(), last = std::min(e->down.outs, first + e->down.piece());
            e->down.as().outputs(e->down.times(e->inner, e->inner_rounded, e->y, e->rows), first, last);
        }
    });
}

// Products with the two halves of kv_b in absorbed attention: w [heads, per_head, rank] as stored, for `group` heads
// starting at `head`. In tile formats, `nope` and `value` are multiples of 8. Activations are never rounded.

// q [rows, group, nope], strides in floats -> latent [group, rows, rank], by the first `nope` rows of each head.
void tierlm_into_latent(int threads, const Matrix* w, const float* q, float* latent, int64_t rows, int64_t head,
                        int64_t group, int64_t nope, int64_t per_head, int64_t row_stride, int64_t head_stride) {
    together(threads, [&](Team& team) {
        for (const int64_t h : team.share(group)) {
            const int64_t first = (head + h) * per_head;
            Product product = w->times(q + h * head_stride, nullptr, latent + h * rows * w->ins, rows);
            product.stride = row_stride;
            w->as().weighted_rows(product, first, first + nope);
        }
    });
}

// mixed [group, rows, rank] -> y [rows, group, value], by the last `value` rows of each head.
void tierlm_from_latent(int threads, const Matrix* w, const float* mixed, float* y, int64_t rows, int64_t head,
                        int64_t group, int64_t value, int64_t per_head) {
    const Matrix exact = w->exact();
    together(threads, [&](Team& team) {
        for (const int64_t h : team.share(group)) {
            const int64_t last = (head + h + 1) * per_head, first = last - value;
            Product product = exact.times(mixed + h * rows * w->ins, nullptr, y + h * value, rows);
            product.stride = group * value;
            product.origin = first;
            exact.as().outputs(product, first, last);
        }
    });
}

}
