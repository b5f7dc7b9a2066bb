// Rounded activations times int8, int4 and the blocks of GGUF files by AVX-512 VNNI, sixteen weight rows at a time. The
// same bits as on other processors: sums of integers are exact, and those of floats have the same order.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
#define TIERLM_AVX512

#include "exact_x86.h"

#ifdef TIERLM_X86

#include <algorithm>
#include <type_traits>

namespace {

constexpr int64_t MANY = 36, AT_ONCE = 8;  // rows that share groups in cache, and the number of groups

// The formats of formats/tiles.py, and where two of their blocks of eight rows are.
struct Int8 : Blocks<32, 256> {};
struct Int4 : Blocks<32, 128> {};
template <>
constexpr bool SIGNED<Int8> = true;
template <>
constexpr int32_t BIAS<Int4> = 8;
template <class Stored>
constexpr bool TILED = std::is_same<Stored, Int8>::value || std::is_same<Stored, Int4>::value;

struct Tiles {
    const uint8_t* tiles[2];
    const uint16_t* scales[2];
    int64_t group;

    INLINED Codes eight(int64_t size, int64_t at) const {
        const auto* low = reinterpret_cast<const __m256i*>(tiles[0] + group * size + at);
        const auto* high = reinterpret_cast<const __m256i*>(tiles[1] + group * size + at);
        const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(low));
        return codes(_mm512_inserti64x4(first, _mm256_loadu_si256(high), 1));
    }
    INLINED Values scale() const {
        const auto* low = reinterpret_cast<const __m128i*>(scales[0] + group * LANES);
        const auto* high = reinterpret_cast<const __m128i*>(scales[1] + group * LANES);
        const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(low));
        return reinterpret_cast<Values>(_mm512_cvtph_ps(_mm256_inserti128_si256(first, _mm_loadu_si128(high), 1)));
    }
};

template <class To>
STEP void unpack(Int8, const Tiles& tiles, To& to) {
#pragma GCC unroll 8
    for (int64_t q = 0; q < 8; ++q) to.quad(0, q, tiles.eight(Int8::bytes, 32 * q));
    to.end(0, only<Int8>(tiles.scale()));
}

template <class To>
STEP void unpack(Int4, const Tiles& tiles, To& to) {
#pragma GCC unroll 4
    for (int64_t q = 0; q < 4; ++q) {
        const Codes both = tiles.eight(Int4::bytes, 32 * q);
        to.quad(0, q, low_nibbles(both));
        to.quad(0, q + 4, high_nibbles(both));
    }
    to.end(0, only<Int4>(tiles.scale()));
}

// Four activations in each lane.
STEP Codes spread(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof quad);
    return codes(_mm512_set1_epi32(quad));
}

// Adds to each lane the products of its four bytes, unsigned, with those of `x`, signed.
STEP Sums plus_products(Sums sum, Codes w, Codes x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

// In each lane the sum of a part of a group's activations, times a factor.
template <class Stored>
STEP Sums sum_times(const Rounded& x, int64_t part, int32_t factor) {
    const uint32_t first = Stored::parts == 1 || part == 0 ? factor & 0xffff : 0;
    const uint32_t second = Stored::parts == 1 || part == 1 ? factor & 0xffff : 0;
    int32_t both;
    std::memcpy(&both, x.sums, sizeof both);
    const __m512i factors = _mm512_set1_epi32(static_cast<int32_t>(first | second << 16));
    return reinterpret_cast<Sums>(_mm512_madd_epi16(_mm512_set1_epi32(both), factors));
}

// What sums of products begin with, since the numbers are stored plus a bias.
template <class Stored>
STEP Sums start(const Rounded& x, int64_t part) {
    constexpr int32_t bias = SIGNED<Stored> ? 128 : BIAS<Stored>;
    return bias ? sum_times<Stored>(x, part, -bias) : Sums{};
}

STEP Values spread(float x) { return reinterpret_cast<Values>(_mm512_set1_ps(x)); }
STEP Values as_floats(Sums x) { return __builtin_convertvector(x, Values); }
STEP Values fused(Values a, Values b, Values c) {
    const auto same = [](Values x) INLINED { return reinterpret_cast<__m512>(x); };
    return reinterpret_cast<Values>(_mm512_fmadd_ps(same(a), same(b), same(c)));
}

// Numbers as unsigned bytes: those that are SIGNED, plus 128.
template <class Stored>
STEP Codes as_unsigned(Codes codes) { return SIGNED<Stored> ? codes ^ 0x80808080u : codes; }

// Adds a group's product to a total. `dots`: the sums of each part.
template <class Stored>
STEP Values plus_group(Values total, const Sums* dots, const Factors<Stored>& factors, const Rounded& x) {
    Values product = {};
    for (int64_t part = 0; part < Stored::parts; ++part) {
        const Values dot = as_floats(dots[part]);
        if (TILED<Stored>) return fused(dot, factors.scales[0] * spread(x.scale), total);
        product = part ? product + dot * factors.scales[part] : dot * factors.scales[part];
    }
    for (int64_t part = 0; Stored::minima && part < Stored::parts; ++part) {
        const Values sum = Stored::parts == 1 ? spread(x.total) : as_floats(sum_times<Stored>(x, part, 1));
        product -= sum * factors.minima[part];
    }
    return total + product * spread(x.scale);
}

// Fetches a part of sixteen rows of a later block, so that reads overlap computation. In small parts, since a processor
// has few reads in flight, and loads wait for one. To L2: sixteen rows of GGUF's blocks and the next sixteen exceed L1.
template <class Stored>
STEP void fetch_ahead(const uint8_t* next, int64_t g, int64_t q) {
    constexpr int64_t lines = ((TILED<Stored> ? 2 : WIDTH) * Stored::bytes + 63) / 64, parts = GROUPS<Stored> * 8;
    for (int64_t i = (8 * g + q) * lines / parts; i < (8 * g + q + 1) * lines / parts; ++i)
        _mm_prefetch(next + 64 * i, _MM_HINT_T1);
}

// Multiplies what is unpacked with one row of activations.
template <class Stored>
struct Multiplied {
    const uint8_t* next;
    const Rounded* x;
    Values total;
    Sums dots[GROUPS<Stored>][Stored::parts];

    INLINED void quad(int64_t g, int64_t q, Codes codes) {
        fetch_ahead<Stored>(next, g, q);
        Sums& dot = dots[g][q * Stored::parts / 8];
        dot = plus_products(dot, as_unsigned<Stored>(codes), spread(x[g].numbers + 4 * q));
    }
    INLINED void end(int64_t g, const Factors<Stored>& factors) {
        total = plus_group(total, dots[g], factors, x[g]);
    }
};

// Keeps what is unpacked for many rows of activations.
template <class Stored>
struct Group {
    Codes quads[GROUP / 4];
    Factors<Stored> factors;
};

template <class Stored>
struct Kept {
    const uint8_t* next;
    Group<Stored>* groups;
    INLINED void quad(int64_t g, int64_t q, Codes codes) {
        fetch_ahead<Stored>(next, g, q);
        groups[g].quads[q] = as_unsigned<Stored>(codes);
    }
    INLINED void end(int64_t g, const Factors<Stored>& factors) { groups[g].factors = factors; }
};

// Adds the products of `count` groups of twice sixteen weight rows and ROWS rows of activations, `stride` groups apart,
// to their totals.
template <class Stored, int ROWS>
STEP void multiply(const Group<Stored>* group, int64_t count, const Rounded* x, int64_t stride, Values* totals) {
    Values total[2 * ROWS];
    for (int r = 0; r < 2 * ROWS; ++r) total[r] = totals[r];
    for (int64_t g = 0; g < count; ++g, ++x, ++group) {
        Sums dots[2 * ROWS][Stored::parts];
        for (int r = 0; r < ROWS; ++r)
            for (int64_t part = 0; part < Stored::parts; ++part)
                dots[2 * r][part] = dots[2 * r + 1][part] = start<Stored>(x[r * stride], part);
#pragma GCC unroll 8
        for (int64_t q = 0; q < 8; ++q) {
            const Codes low = group->quads[q], high = group[AT_ONCE].quads[q];
            for (int r = 0; r < ROWS; ++r) {
                const Codes four = spread(x[r * stride].numbers + 4 * q);
                Sums &of_low = dots[2 * r][q * Stored::parts / 8], &of_high = dots[2 * r + 1][q * Stored::parts / 8];
                of_low = plus_products(of_low, low, four);
                of_high = plus_products(of_high, high, four);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            total[2 * r] = plus_group(total[2 * r], dots[2 * r], group->factors, x[r * stride]);
            total[2 * r + 1] = plus_group(total[2 * r + 1], dots[2 * r + 1], group[AT_ONCE].factors, x[r * stride]);
        }
    }
    for (int r = 0; r < 2 * ROWS; ++r) totals[r] = total[r];
}

// Sixteen weight rows from `out` on. Lanes past the last row repeat it.
template <class Stored>
struct Source {
    Rows rows;
    Tiles tiles;
    const uint8_t* next;  // fetched ahead

    // `ahead`: how many weight rows further on `next` begins.
    INLINED Source(const Product& p, int64_t out, int64_t last, int64_t ahead) {
        const int64_t groups = groups_of(p.ins), size = groups / GROUPS<Stored> * Stored::bytes;
        if (TILED<Stored>) {
            const auto* scales = static_cast<const uint16_t*>(p.scale);
            for (int64_t i = 0; i < 2; ++i) {
                const int64_t block = std::min(out / LANES + i, (last - 1) / LANES);
                tiles.tiles[i] = p.w + block * size;
                tiles.scales[i] = scales + block * groups * LANES;
            }
            tiles.group = 0;
            next = tiles.tiles[0] + ahead / LANES * size;
        } else {
            for (int64_t r = 0; r < WIDTH; ++r) rows.row[r] = p.w + std::min(out + r, last - 1) * size;
            rows.block = 0;
            next = rows.row[0] + ahead * size;
        }
    }

    template <class To>
    INLINED void block(To& to) {
        to.next = next;
        next += (TILED<Stored> ? 2 : WIDTH) * Stored::bytes;
        if constexpr (TILED<Stored>) {
            unpack(Stored(), tiles, to);
            ++tiles.group;
        } else {
            unpack(Stored(), rows, to);
            rows.block += Stored::bytes;
        }
    }
};

// Fetches the first weight rows of a piece in order, since nothing fetched them ahead.
template <class Stored>
STEP void fetch_first(const Product& p, int64_t first, int64_t last) {
    const int64_t size = groups_of(p.ins) / GROUPS<Stored> * Stored::bytes, rows = TILED<Stored> ? LANES : 1;
    for (int64_t at = first / rows * size; at < (last + rows - 1) / rows * size; at += 64)
        _mm_prefetch(p.w + at, _MM_HINT_T1);
}

// How far on weights are fetched: `rows`, or not past a piece's end, where another thread's weights lie, or nothing.
STEP int64_t ahead_of(int64_t out, int64_t last, int64_t rows) { return out + rows < last ? rows : 0; }

STEP void store(const Product& p, int64_t row, int64_t out, int64_t last, Values total) {
    const auto lanes = static_cast<__mmask16>((1u << std::min<int64_t>(WIDTH, last - out)) - 1);
    _mm512_mask_storeu_ps(p.y + row * p.stride + out - p.origin, lanes, reinterpret_cast<__m512>(total));
}

template <class Stored>
TARGET void outputs_of_row(const Product& p, int64_t first, int64_t last) {
    fetch_first<Stored>(p, first, std::min<int64_t>(first + WIDTH, last));
    for (int64_t out = first; out < last; out += WIDTH) {
        Source<Stored> weights(p, out, last, ahead_of(out, last, WIDTH));
        Values total = {};
        for (int64_t g = 0; g < groups_of(p.ins); g += GROUPS<Stored>) {
            Multiplied<Stored> product = {nullptr, p.rounded + g, total, {}};
            for (int64_t i = 0; i < GROUPS<Stored>; ++i)
                for (int64_t part = 0; part < Stored::parts; ++part)
                    product.dots[i][part] = start<Stored>(product.x[i], part);
            weights.block(product);
            total = product.total;
        }
        store(p, 0, out, last, total);
    }
}

template <class Stored>
TARGET void outputs(const Product& p, int64_t first, int64_t last) {
    if (p.rows == 1) return outputs_of_row<Stored>(p, first, last);
    const int64_t groups = groups_of(p.ins);
    fetch_first<Stored>(p, first, std::min<int64_t>(first + 2 * WIDTH, last));
    for (int64_t row = 0; row < p.rows; row += MANY) {
        const int64_t rows = std::min(MANY, p.rows - row);
        for (int64_t out = first; out < last; out += 2 * WIDTH) {
            const int64_t ahead = ahead_of(out, last, 2 * WIDTH);
            Source<Stored> low(p, out, last, ahead), high(p, std::min(out + WIDTH, last - 1), last, ahead);
            Values totals[2 * MANY] = {};
            for (int64_t g = 0; g < groups; g += AT_ONCE) {
                Group<Stored> cached[2 * AT_ONCE];
                const int64_t count = std::min(AT_ONCE, groups - g);
                for (int64_t i = 0; i < count; i += GROUPS<Stored>) {
                    Kept<Stored> first_half = {nullptr, cached + i}, second_half = {nullptr, cached + AT_ONCE + i};
                    low.block(first_half);
                    high.block(second_half);
                }
                const Rounded* x = p.rounded + row * groups + g;
                int64_t r = 0;
                for (; r + 6 <= rows; r += 6)
                    multiply<Stored, 6>(cached, count, x + r * groups, groups, totals + 2 * r);
                for (; r + 2 <= rows; r += 2)
                    multiply<Stored, 2>(cached, count, x + r * groups, groups, totals + 2 * r);
                if (r < rows) multiply<Stored, 1>(cached, count, x + r * groups, groups, totals + 2 * r);
            }
            for (int64_t r = 0; r < rows; ++r) {
                store(p, row + r, out, last, totals[2 * r]);
                if (out + WIDTH < last) store(p, row + r, out + WIDTH, last, totals[2 * r + 1]);
            }
        }
    }
}

#define OUTPUTS_OF(Stored) outputs<Stored>,
#define EXACT_OF(Stored) exact<Stored>,
const Work OUTPUTS[] = {EACH_BLOCKS(OUTPUTS_OF) EACH_BLOCKS(EXACT_OF)};

}  // namespace

const Work* ggml_outputs_avx512() { return has_avx512() ? OUTPUTS : nullptr; }
Work int8_outputs_avx512() { return has_avx512() ? outputs<Int8> : nullptr; }
Work int4_outputs_avx512() { return has_avx512() ? outputs<Int4> : nullptr; }

#else

const Work* ggml_outputs_avx512() { return nullptr; }
Work int8_outputs_avx512() { return nullptr; }
Work int4_outputs_avx512() { return nullptr; }

#endif
