// How the rows of weights are shared out among the threads of a team.
//
// The threads are OpenMP's, and in practice torch's own: a second pool beside it would fight it for the cores, since
// either keeps its idle threads spinning for a while.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>

#include "product.h"

// A weight, or a vector of floats as one row, as Python passes it: Weight.operand in kernels/weight.py.
struct Matrix {
    int64_t format;  // counts FLOAT_FORMATS, then TILE_FORMATS
    const uint8_t* data;
    const void* scale;
    int64_t outs, ins;

    const Format& as() const { return format < FLOATS ? FLOAT_FORMATS[format] : TILE_FORMATS[format - FLOATS]; }
    // The same, taking activations as they are.
    Matrix exact() const { return {as().rounds ? format + TILES / 2 : format, data, scale, outs, ins}; }
    Product times(const float* x, const Rounded* rounded, float* y, int64_t rows) const {
        return {x, rounded, data, scale, y, rows, ins, outs, outs};
    }
    // Work is shared out in pieces of about 64 Ki weights: long enough to outweigh the hand-over, short enough to end
    // together; and whole tiles and groups of columns, since an expert's inner values are columns next.
    int64_t piece() const { return std::max<int64_t>(GROUP, 65536 / std::max<int64_t>(ins, 1) / GROUP * GROUP); }
    int64_t pieces() const { return (outs + piece() - 1) / piece(); }
};

struct Job {
    const Matrix* matrix;
    Product product;
};

// By all threads of a team: the outputs of some products, and every thread waits for all.
inline void compute(std::initializer_list<Job> jobs) {
    int64_t total = 0;
    for (const Job& job : jobs) total += job.matrix->pieces();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < total; ++i) {
        int64_t at = i;
        const Job* job = jobs.begin();
        for (; at >= job->matrix->pieces(); ++job) at -= job->matrix->pieces();
        const int64_t piece = job->matrix->piece();
        job->matrix->as().outputs(job->product, at * piece, std::min(job->matrix->outs, (at + 1) * piece));
    }
}

// A vector that is one row of stored floats, as float32; null for none.
inline std::unique_ptr<float[]> floats_of(const Matrix& vector) {
    if (!vector.data) return nullptr;
    std::unique_ptr<float[]> wide(new float[vector.ins]);
    const float one = 1;
    vector.as().weighted_rows(vector.times(&one, nullptr, wide.get(), 1), 0, 1);
    return wide;
}

// Memory for `count` values, as it comes.
template <class T>
std::unique_ptr<T[]> room(int64_t count) {
    return std::unique_ptr<T[]>(new T[std::max<int64_t>(count, 1)]);
}
