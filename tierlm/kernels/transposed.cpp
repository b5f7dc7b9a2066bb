// The four-bit integers of AWQ and GPTQ on any processor. Eight weight rows are the lanes of a vector.
//
// Products are rounded before additions (no FMA), see transposed.h.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "transposed.h"

#include <algorithm>
#include <cstring>

namespace {

INLINE Words words_at(const void* p, int64_t at) { return *reinterpret_cast<const LooseWords*>(static_cast<const uint8_t*>(p) + 4 * at); }

INLINE uint32_t word_at(const void* p, int64_t at) {
    uint32_t word;
    std::memcpy(&word, static_cast<const uint8_t*>(p) + 4 * at, sizeof word);
    return word;
}

// The numbers of eight rows in a word.
template <class Stored>
INLINE Ints of_rows(uint32_t word) {
    const Words shifts = Stored::down ? Words{0, 4, 8, 12, 16, 20, 24, 28} : Words{0, 16, 4, 20, 8, 24, 12, 28};
    return reinterpret_cast<Ints>((Words{} + word) >> shifts & 15u);
}

// The numbers in one column of the eight rows from `out`.
template <class Stored>
INLINE Ints numbers(const Product& p, int64_t out, int64_t column) {
    if (!Stored::down) return of_rows<Stored>(word_at(p.w, (column * p.outs + out) / 8));
    return reinterpret_cast<Ints>(words_at(p.w, column / 8 * p.outs + out) >> static_cast<uint32_t>(column % 8 * 4) & 15u);
}

template <class Stored>
INLINE Ints zeros(const Product& p, int64_t out, int64_t column) {
    return of_rows<Stored>(word_at(p.extra, (column / Stored::columns * p.outs + out) / 8) + Stored::less);
}

template <class Stored>
INLINE Floats scales(const Product& p, int64_t out, int64_t column) {
    return from_half(static_cast<const uint16_t*>(p.scale) + column / Stored::columns * p.outs + out);
}

INLINE Floats as_floats(Ints whole) { return __builtin_convertvector(whole, Floats); }

INLINE void store(const Product& p, int64_t row, int64_t out, Floats total) {
    *reinterpret_cast<Floats*>(p.y + row * p.stride + out - p.origin) = total;
}

// Rounded activations.
template <class Stored>
INLINE void outputs(const Product& p, int64_t first, int64_t last) {
    for (int64_t out = first; out < last; out += LANES) {
        for (int64_t row = 0; row < p.rows; ++row) {
            const Rounded* x = p.rounded + row * groups_of(p.ins);
            Floats total = {};
            for (int64_t column = 0; column < p.ins; column += GROUP, ++x) {
                Ints sum = zeros<Stored>(p, out, column) * -x->sum();
                for (int64_t c = 0; c < GROUP; ++c) sum += numbers<Stored>(p, out, column + c) * x->numbers[c];
                total += as_floats(sum) * scales<Stored>(p, out, column) * x->scale;
            }
            store(p, row, out, total);
        }
    }
}

// Unrounded activations.
template <class Stored>
INLINE void exact(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t MANY = 4;  // rows that share widened values
    for (int64_t row = 0; row < p.rows; row += MANY) {
        const int64_t rows = std::min(MANY, p.rows - row);
        for (int64_t out = first; out < last; out += LANES) {
            Floats totals[MANY] = {};
            for (int64_t start = 0; start < p.ins; start += Stored::columns) {
                const Ints zero = zeros<Stored>(p, out, start);
                Floats sums[MANY] = {};
                for (int64_t i = start; i < start + Stored::columns; ++i) {
                    const Floats w = as_floats(numbers<Stored>(p, out, i) - zero);
                    for (int64_t r = 0; r < rows; ++r) sums[r] += w * p.x[(row + r) * p.ins + i];
                }
                for (int64_t r = 0; r < rows; ++r) totals[r] += sums[r] * scales<Stored>(p, out, start);
            }
            for (int64_t r = 0; r < rows; ++r) store(p, row + r, out, totals[r]);
        }
    }
}

constexpr int64_t PART = 8;  // columns at once; a group has a multiple of them

// Format::weighted_rows; `first` and `last` are multiples of 8. Lanes are summed only at the end.
template <class Stored>
INLINE void weighted_rows(const Product& p, int64_t first, int64_t last) {
    for (int64_t r = 0; r < p.rows; ++r) {
        for (int64_t column = 0; column < p.ins; column += PART) {
            Floats sums[PART] = {};
            for (int64_t out = first; out < last; out += LANES) {
                const Floats x = *reinterpret_cast<const Floats*>(p.x + r * p.stride + out - first);
                const Floats factor = x * scales<Stored>(p, out, column);
                const Ints zero = zeros<Stored>(p, out, column);
                for (int64_t c = 0; c < PART; ++c)
                    sums[c] += as_floats(numbers<Stored>(p, out, column + c) - zero) * factor;
            }
            for (int64_t c = 0; c < PART; ++c) {
                float total = 0;
                for (int i = 0; i < LANES; ++i) total += sums[c][i];
                p.y[r * p.ins + column + c] = total;
            }
        }
    }
}

template <class Stored>
INLINE void widened(const Product& p, int64_t first, int64_t last) {
    for (int64_t out = first; out < last; out += LANES) {
        for (int64_t column = 0; column < p.ins; column += PART) {
            const Ints zero = zeros<Stored>(p, out, column);
            const Floats scale = scales<Stored>(p, out, column);
            Floats values[PART];
            for (int64_t c = 0; c < PART; ++c) values[c] = as_floats(numbers<Stored>(p, out, column + c) - zero) * scale;
            for (int64_t lane = 0; lane < LANES; ++lane)
                for (int64_t c = 0; c < PART; ++c) p.y[(out + lane) * p.ins + column + c] = values[c][lane];
        }
    }
}

#define NUMBER(Stored) NUMBER_##Stored,
enum { EACH_TRANSPOSED(NUMBER) COUNT };
static_assert(TRANSPOSED == 2 * COUNT, "all, each with rounded and unrounded activations");

#define KERNEL(name, work, Stored) \
    CLONES void name##_##Stored(const Product& p, int64_t first, int64_t last) { work<Stored>(p, first, last); }
// x86 kernels take whole tiles.
#define KERNELS(Stored)                                                             \
    KERNEL(plain, outputs, Stored)                                                  \
    KERNEL(exact, exact, Stored)                                                    \
    KERNEL(rows, weighted_rows, Stored)                                             \
    KERNEL(widened, widened, Stored)                                                \
    void outputs_##Stored(const Product& p, int64_t first, int64_t last) {          \
        static const Work* const x86 = transposed_outputs_x86();                    \
        const int64_t edge = x86 ? first + (last - first) / TILE * TILE : first;    \
        if (edge > first) x86[NUMBER_##Stored](p, first, edge);                     \
        plain_##Stored(p, edge, last);                                              \
    }
EACH_TRANSPOSED(KERNELS)

}  // namespace

// Of a column of AWQ, two cache lines.
#define ROUNDED(Stored) {outputs_##Stored, rows_##Stored, widened_##Stored, true, 4 * TILE},
#define UNROUNDED(Stored) {exact_##Stored, rows_##Stored, widened_##Stored, false, 4 * TILE},
const Format TRANSPOSED_FORMATS[TRANSPOSED] = {EACH_TRANSPOSED(ROUNDED) EACH_TRANSPOSED(UNROUNDED)};
