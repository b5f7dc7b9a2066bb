// Reads, writes and copies of memory that no cache holds, in the manner of McCalpin's STREAM. Arguments: MiB of each of
// two arrays, threads, rounds. Prints bytes a second of each round: read, write, copy. The copy is memcpy, as gcc makes
// of STREAM's own loop, whose arrays it knows not to overlap; that of many bytes is written past the caches, and which
// are many depends on the processor, so what is compared with it has to copy as many at a time.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <omp.h>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int, char** arguments) {
    const int64_t count = atoll(arguments[1]) * 1048576 / 8;
    const int threads = atoi(arguments[2]), rounds = atoi(arguments[3]);
    omp_set_num_threads(threads);
    int64_t* one = static_cast<int64_t*>(aligned_alloc(1 << 21, count * 8));
    int64_t* other = static_cast<int64_t*>(aligned_alloc(1 << 21, count * 8));
    madvise(one, count * 8, MADV_HUGEPAGE);
    madvise(other, count * 8, MADV_HUGEPAGE);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) one[i] = i, other[i] = -i;
    volatile int64_t sink = 0;
    for (int round = 0; round < rounds; round++) {
        double began = now();
        int64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) sum += one[i];
        sink = sink + sum;
        double read = count * 8 / (now() - began);
        began = now();
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < count; i++) other[i] = round;
        double write = count * 8 / (now() - began);
        began = now();
#pragma omp parallel for schedule(static)
        for (int part = 0; part < threads; part++)
            memcpy(other + part * (count / threads), one + part * (count / threads), count / threads * 8);
        printf("%.0f %.0f %.0f\n", read, write, 2 * count * 8 / (now() - began));
    }
}
