// Threads that populate memory ahead of need, on processors that idle.

#pragma once

#include <sched.h>
#include <semaphore.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <thread>

namespace {

// A page fault commits a page of the system's memory, clears it, and on a virtual machine first gets it back from the
// host: about 2 s a gigabyte. The threads run under SCHED_IDLE: any other thread goes first. They take no lock, so that
// nobody waits for one that got no processor. All calls are made by threads that hold the caller's lock, but for `wait`.
class Populator {
    static constexpr uintptr_t PAGE = 4096;  // no page is smaller

    struct Toucher {
        std::thread thread;
        sem_t given;
        char *begin = nullptr, *end = nullptr;
        int64_t number = 0;             // of its memory; 0: none
        std::atomic<bool> wanted{false};  // false: stop
        std::atomic<bool> idle{true};
    };

    std::deque<Toucher> touchers;
    sem_t changed;
    std::atomic<bool> closed{false};

    static void await(sem_t& semaphore) {
        while (sem_wait(&semaphore)) continue;  // interrupted
    }

    void run(Toucher& self) {
        const sched_param none{};
        if (sched_setscheduler(0, SCHED_IDLE, &none)) setpriority(PRIO_PROCESS, 0, 19);
        for (;;) {
            await(self.given);
            if (closed) return;
            touch(self);
            self.idle.store(true, std::memory_order_release);
            sem_post(&changed);
        }
    }

    // Changes no byte, whoever writes to them meanwhile. A page fault locks one mapping; MADV_POPULATE_WRITE would lock the
    // whole address space, for which allocations then wait.
    static void touch(Toucher& self) {
        for (char* at = self.begin; at < self.end && self.wanted.load(std::memory_order_relaxed);
             at += PAGE - reinterpret_cast<uintptr_t>(at) % PAGE)
            __atomic_fetch_or(at, 0, __ATOMIC_RELAXED);
    }

    // Waits for the threads: for the page fault that each may be in.
    void close() {
        closed = true;
        for (Toucher& toucher : touchers) toucher.wanted = false, sem_post(&toucher.given);
        for (Toucher& toucher : touchers)
            if (toucher.thread.joinable()) toucher.thread.join();
        touchers.clear();
    }

public:
    // Throws if the system refuses a thread; no other is left then.
    explicit Populator(int threads) {
        sem_init(&changed, 0, 0);
        try {
            for (int i = 0; i < threads; ++i) {
                Toucher& toucher = touchers.emplace_back();
                sem_init(&toucher.given, 0, 0);
                toucher.thread = std::thread([this, &toucher] { run(toucher); });
                pthread_setname_np(toucher.thread.native_handle(), "tierlm-touch");
            }
        } catch (...) {
            close();
            throw;
        }
    }

    ~Populator() { close(); }

    // Begins to populate memory. False if all threads are busy.
    bool give(int64_t number, char* begin, char* end) {
        for (Toucher& toucher : touchers) {
            if (toucher.number || !toucher.idle.load(std::memory_order_acquire)) continue;
            toucher.number = number, toucher.begin = begin, toucher.end = end;
            toucher.wanted = true, toucher.idle = false;
            sem_post(&toucher.given);
            return true;
        }
        return false;
    }

    // The number of memory that was populated since the last call, or 0.
    int64_t take_done() {
        for (Toucher& toucher : touchers)
            if (toucher.number && toucher.idle.load(std::memory_order_acquire)) {
                const int64_t number = toucher.number;
                toucher.number = 0;
                return number;
            }
        return 0;
    }

    // The lowest number of memory in work.
    int64_t first() const {
        int64_t found = INT64_MAX;
        for (const Toucher& toucher : touchers)
            if (toucher.number) found = std::min(found, toucher.number);
        return found;
    }

    // Ends the work on some memory; one more page may be touched.
    void stop(int64_t number) {
        for (Toucher& toucher : touchers)
            if (toucher.number == number) toucher.wanted = false, toucher.number = 0;
    }

    // Waits until a thread has finished, or for `wake`.
    void wait() { await(changed); }

    void wake() { sem_post(&changed); }
};

}  // namespace
