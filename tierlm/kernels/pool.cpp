#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// More than a call takes to follow another within a layer; less than a read takes.
constexpr std::chrono::microseconds SPIN{50};
constexpr int WOKEN = 2;  // threads that one thread wakes; they wake others

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// A number that changes, and threads that wait until it does.
class Signal {
   public:
    uint32_t now() const { return value_.load(); }

    void change(int woken) {
        value_.fetch_add(1);
        wake(woken);
    }

    void wake(int count) {
        if (sleepers_.load()) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
    }

    // Returns once the number is not `seen`: true if it slept until then.
    bool wait(uint32_t seen) {
        const auto until = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 8; ++i, pause())
                if (now() != seen) return false;
        } while (std::chrono::steady_clock::now() < until);
        ++sleepers_;  // before the number is compared again, by the kernel: who changes it then sees the sleeper
        while (now() == seen) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        --sleepers_;
        return true;
    }

   private:
    alignas(64) std::atomic<uint32_t> value_{0}, sleepers_{0};
    static_assert(sizeof(std::atomic<uint32_t>) == 4, "the kernel reads it");
};

std::atomic<int> forks{0};  // of this process and those it comes from

}  // namespace

// The helpers of one calling thread.
class Pool {
   public:
    Pool() = default;
    ~Pool() {
        ending_ = true;
        began_.change(INT_MAX);
        for (std::thread& helper : helpers_) helper.join();
    }

    bool copied() const { return forks_ != forks.load(); }  // by a fork, without its threads

    void run(int threads, Call call, const void* work) {
        start(threads - 1);
        call_ = call, work_ = work, most_ = threads - 1;
        turn_.store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        if (threads > 1) {
            door_.store(OPEN);
            began_.change(std::min(WOKEN, threads - 1));
        }
        Team team(*this);
        call(work, team);
        for (uint32_t seen = left_.now(), inside = door_.fetch_and(~OPEN) & ~OPEN; inside; inside = door_.load()) {
            left_.wait(seen);
            seen = left_.now();
        }
    }

    int64_t claim(uint32_t loop, int64_t count) {
        uint64_t turn = turn_.load();
        while (turn >> 32 == loop && static_cast<int64_t>(turn & LAST) < count)
            if (turn_.compare_exchange_weak(turn, turn + 1)) return turn & LAST;
        while (true) {
            const uint32_t seen = ended_.now();
            if (turn_.load() >> 32 != loop) return -1;
            ended_.wait(seen);
        }
    }

    void finish(uint32_t loop, int64_t count) {
        if (done_.fetch_add(1) + 1 != count) return;
        done_.store(0);
        turn_.store(uint64_t{loop + 1} << 32);
        ended_.change(INT_MAX);
    }

   private:
    static constexpr uint32_t OPEN = 1u << 31;
    static constexpr uint64_t LAST = 0xffffffff;

    void start(int count) {
        if (static_cast<int>(helpers_.size()) >= count) return;
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);  // the process's own threads handle signals
        try {
            while (static_cast<int>(helpers_.size()) < count) {
                helpers_.emplace_back(&Pool::help, this, began_.now());
                pthread_setname_np(helpers_.back().native_handle(), "tierlm-compute");
            }
        } catch (const std::system_error&) {  // the system's limits: do with fewer
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void help(uint32_t seen) {
        while (true) {
            if (began_.wait(seen) && door_.load() & OPEN) began_.wake(WOKEN);
            seen = began_.now();
            if (ending_) return;
            if (!enter()) continue;
            Team team(*this);
            call_(work_, team);
            if (--door_ == 0) left_.change(1);
        }
    }

    // Whether the call still goes on and needs one more thread.
    bool enter() {
        uint32_t door = door_.load();
        while (door & OPEN && static_cast<int>(door & ~OPEN) < most_.load())
            if (door_.compare_exchange_weak(door, door + 1)) return true;
        return false;
    }

    const int forks_ = forks.load();
    Signal began_, ended_, left_;  // a call; a loop; the last thread of a call
    alignas(64) std::atomic<uint64_t> turn_{0};  // the loop, and the next to be claimed in it
    std::atomic<int64_t> done_{0};               // of this loop
    alignas(64) std::atomic<uint32_t> door_{0};  // OPEN during a call, and the helpers inside
    std::atomic<int> most_{0};
    std::atomic<bool> ending_{false};
    Call call_ = nullptr;
    const void* work_ = nullptr;
    std::vector<std::thread> helpers_;
};

int64_t Team::claim(int64_t count) {
    if (count <= 0) return -1;
    const int64_t found = pool_.claim(loop_, count);
    loop_ += found < 0;
    return found;
}

void Team::finish(int64_t count) { pool_.finish(loop_, count); }

void run_together(int threads, Call call, const void* work) {
    static const int watched = pthread_atfork(nullptr, nullptr, [] { ++forks; });
    static_cast<void>(watched);
    struct End {
        void operator()(Pool* pool) const {
            if (!pool->copied()) delete pool;  // in a fork there is nobody to join
        }
    };
    thread_local std::unique_ptr<Pool, End> mine;
    if (!mine || mine->copied()) mine.reset(new Pool);
    mine->run(std::max(threads, 1), call, work);
}
