// Weights as int8 or int4 in tiles of 8 rows x 32 columns (formats/tiles.py). The 8 rows of a tile are the 8 lanes of a
// vector.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace {

// Each struct loads the numbers of one column of a tile.
struct Int8 {
    static constexpr int64_t tile = 256;
    static INLINE Ints column(const uint8_t* w, int64_t c) {
        const Words quad = *reinterpret_cast<const LooseWords*>(w + c / 4 * 32);
        return reinterpret_cast<Ints>(quad << (24 - c % 4 * 8)) >> 24;
    }
};

struct Int4 {
    static constexpr int64_t tile = 128;
    static INLINE Ints column(const uint8_t* w, int64_t c) {
        const Words quads = *reinterpret_cast<const LooseWords*>(w + c % 16 / 4 * 32);
        return reinterpret_cast<Ints>((quads >> (c % 4 * 8 + c / 16 * 4)) & 15u) - 8;
    }
};

template <class Stored>
INLINE const uint8_t* tile_at(const Product& p, int64_t block, int64_t group) {
    return p.w + (block * groups_of(p.ins) + group) * Stored::tile;
}

INLINE Floats scales_at(const Product& p, int64_t block, int64_t group) {
    return from_half(static_cast<const uint16_t*>(p.scale) + (block * groups_of(p.ins) + group) * LANES);
}

// Stores the outputs of a block of 8 rows, without padding.
INLINE void store(const Product& p, int64_t row, int64_t block, int64_t last, Floats total) {
    const int64_t first = block * LANES;
    std::memcpy(p.y + row * p.stride + first - p.origin, &total, std::min<int64_t>(LANES, last - first) * sizeof(float));
}

// ROWS rows of unrounded activations.
template <class Stored, int ROWS>
INLINE void exact_rows(const Product& p, int64_t first, int64_t last, int64_t row) {
    for (int64_t block = first / LANES; block * LANES < last; ++block) {
        Floats total[ROWS] = {};
        for (int64_t g = 0; g < groups_of(p.ins); ++g) {
            const uint8_t* w = tile_at<Stored>(p, block, g);
            const float* x = p.x + row * p.ins + g * GROUP;
            Floats sum[ROWS] = {};
            const auto add = [&](int64_t c) {
                const Floats numbers = __builtin_convertvector(Stored::column(w, c), Floats);
                for (int r = 0; r < ROWS; ++r) sum[r] += numbers * x[r * p.ins + c];
            };
            if (p.ins - g * GROUP >= GROUP) {
                for (int64_t c = 0; c < GROUP; ++c) add(c);
            } else {
                for (int64_t c = 0; c < p.ins - g * GROUP; ++c) add(c);
            }
            const Floats scales = scales_at(p, block, g);
            for (int r = 0; r < ROWS; ++r) total[r] += sum[r] * scales;
        }
        for (int r = 0; r < ROWS; ++r) store(p, row + r, block, last, total[r]);
    }
}

template <class Stored>
INLINE void exact(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) exact_rows<Stored, 4>(p, first, last, row);
    for (; row < p.rows; ++row) exact_rows<Stored, 1>(p, first, last, row);
}

// Rounded activations on any processor.
template <class Stored>
INLINE void outputs(const Product& p, int64_t first, int64_t last) {
    const int64_t groups = groups_of(p.ins);
    for (int64_t row = 0; row < p.rows; ++row) {
        for (int64_t block = first / LANES; block * LANES < last; ++block) {
            Floats total = {};
            for (int64_t g = 0; g < groups; ++g) {
                const Rounded& x = p.rounded[row * groups + g];
                const uint8_t* w = tile_at<Stored>(p, block, g);
                Ints sum = {};
                for (int64_t c = 0; c < GROUP; ++c) sum += Stored::column(w, c) * x.numbers[c];
                total += __builtin_convertvector(sum, Floats) * (scales_at(p, block, g) * x.scale);
            }
            store(p, row, block, last, total);
        }
    }
}

// Format::weighted_rows; `first` and `last` are multiples of 8. Lanes are summed only at the end.
template <class Stored>
INLINE void weighted_rows(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t PART = 8;  // columns whose sums stay in registers
    for (int64_t r = 0; r < p.rows; ++r) {
        for (int64_t start = 0; start < p.ins; start += PART) {
            Floats sums[PART] = {};
            const int64_t g = start / GROUP;
            for (int64_t block = first / LANES; block * LANES < last; ++block) {
                const float* x = p.x + r * p.stride + block * LANES - first;
                const Floats factor = *reinterpret_cast<const Floats*>(x) * scales_at(p, block, g);
                const uint8_t* w = tile_at<Stored>(p, block, g);
                for (int64_t c = 0; c < PART; ++c)
                    sums[c] += __builtin_convertvector(Stored::column(w, start % GROUP + c), Floats) * factor;
            }
            for (int64_t c = 0; c < std::min(PART, p.ins - start); ++c) {
                float total = 0;
                for (int i = 0; i < LANES; ++i) total += sums[c][i];
                p.y[r * p.ins + start + c] = total;
            }
        }
    }
}

template <class Stored>
INLINE void widened(const Product& p, int64_t first, int64_t last) {
    for (int64_t block = first / LANES; block * LANES < last; ++block) {
        const int64_t lanes = std::min<int64_t>(LANES, last - block * LANES);
        for (int64_t g = 0; g < groups_of(p.ins); ++g) {
            const Floats scales = scales_at(p, block, g);
            const uint8_t* w = tile_at<Stored>(p, block, g);
            float values[GROUP][LANES];
            for (int64_t c = 0; c < GROUP; ++c) {
                const Floats column = __builtin_convertvector(Stored::column(w, c), Floats) * scales;
                std::memcpy(values[c], &column, sizeof column);
            }
            const int64_t columns = std::min(GROUP, p.ins - g * GROUP);
            for (int64_t lane = 0; lane < lanes; ++lane)
                for (int64_t c = 0; c < columns; ++c)
                    p.y[(block * LANES + lane) * p.ins + g * GROUP + c] = values[c][lane];
        }
    }
}

CLONES void plain_int8(const Product& p, int64_t first, int64_t last) { outputs<Int8>(p, first, last); }
CLONES void plain_int4(const Product& p, int64_t first, int64_t last) { outputs<Int4>(p, first, last); }
CLONES void exact_int8(const Product& p, int64_t first, int64_t last) { exact<Int8>(p, first, last); }
CLONES void exact_int4(const Product& p, int64_t first, int64_t last) { exact<Int4>(p, first, last); }
CLONES void rows_int8(const Product& p, int64_t first, int64_t last) { weighted_rows<Int8>(p, first, last); }
CLONES void rows_int4(const Product& p, int64_t first, int64_t last) { weighted_rows<Int4>(p, first, last); }
CLONES void widened_int8(const Product& p, int64_t first, int64_t last) { widened<Int8>(p, first, last); }
CLONES void widened_int4(const Product& p, int64_t first, int64_t last) { widened<Int4>(p, first, last); }

Work either(Work best, Work plain) { return best ? best : plain; }

}  // namespace

const Format TILE_FORMATS[TILES] = {
    {either(int8_outputs_avx512(), either(int8_outputs_avx2(), plain_int8)), rows_int8, widened_int8, true},
    {either(int4_outputs_avx512(), either(int4_outputs_avx2(), plain_int4)), rows_int4, widened_int4, true},
    {exact_int8, rows_int8, widened_int8, false},
    {exact_int4, rows_int4, widened_int4, false},
};
