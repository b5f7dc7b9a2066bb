// Distributes rows of weights among the threads of a team.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>

#include "pool.h"
#include "product.h"

// A weight, or a vector of floats as one row, passed from Python: Weight.operand in kernels/weight.py.
struct Matrix {
    static constexpr int64_t PIECE = 262144, PIECES = 8;
    int64_t format;  // index into the tables of product.h, one after the other
    const uint8_t* data;
    const void* scale;
    int64_t outs, ins;
    const void* extra;

    const Format& as() const {
        int64_t at = format;
        if (at < FLOATS) return FLOAT_FORMATS[at];
        if ((at -= FLOATS) < TILES) return TILE_FORMATS[at];
        if ((at -= TILES) < GGML) return GGML_FORMATS[at];
        if ((at -= GGML) < NIBBLES) return NIBBLE_FORMATS[at];
        if ((at -= NIBBLES) < FLOAT8) return FLOAT8_FORMATS[at];
        return TRANSPOSED_FORMATS[at - FLOAT8];
    }
    // The same weight, with unrounded activations.
    Matrix exact() const {
        const int64_t half = (format < FLOATS + TILES ? TILES : format < FLOATS + TILES + GGML ? GGML : TRANSPOSED) / 2;
        return {as().rounds ? format + half : format, data, scale, outs, ins, extra};
    }
    Product times(const float* x, const Rounded* rounded, float* y, int64_t rows) const {
        return {x, rounded, data, scale, y, rows, ins, outs, outs, 0, extra};
    }
    // Rows per unit of work, at most PIECE weights: enough that kernels seldom fetch ahead what another thread will
    // compute, few enough to balance threads. Small matrices have up to PIECES pieces, since two unequal ones keep a
    // thread waiting. A multiple of GROUP: whole tiles, and whole groups when an expert's inner values are rounded for
    // `down`.
    int64_t piece() const {
        const int64_t least = as().least, weights = std::min(PIECE, std::max(PIECE / 8, outs * ins / PIECES));
        return std::max(least, weights / std::max<int64_t>(ins, 1) / least * least);
    }
    int64_t pieces() const { return (outs + piece() - 1) / piece(); }
};

struct Job {
    const Matrix* matrix;
    Product product;
};

// Computes the outputs of several products, called by all threads of a team.
inline void compute(Team& team, std::initializer_list<Job> jobs) {
    int64_t total = 0;
    for (const Job& job : jobs) total += job.matrix->pieces();
    for (const int64_t i : team.share(total)) {
        int64_t at = i;
        const Job* job = jobs.begin();
        for (; at >= job->matrix->pieces(); ++job) at -= job->matrix->pieces();
        const int64_t piece = job->matrix->piece();
        job->matrix->as().outputs(job->product, at * piece, std::min(job->matrix->outs, (at + 1) * piece));
    }
}

// A vector, stored as one row of floats, as float32; null if absent.
inline std::unique_ptr<float[]> floats_of(const Matrix& vector) {
    if (!vector.data) return nullptr;
    std::unique_ptr<float[]> wide(new float[vector.ins]);
    const float one = 1;
    vector.as().weighted_rows(vector.times(&one, nullptr, wide.get(), 1), 0, 1);
    return wide;
}

// Uninitialised memory for `count` values.
template <class T>
std::unique_ptr<T[]> room(int64_t count) {
    return std::unique_ptr<T[]>(new T[std::max<int64_t>(count, 1)]);
}
