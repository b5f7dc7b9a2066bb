// Threads that compute one call together.
//
// A call never waits for a thread to wake: work is handed out piece by piece, so threads that come late find less left, or
// nothing. They look for new work for SPIN, in case the next call follows at once, and then sleep, which leaves the
// cores to reads. Each calling thread has its own helpers, which end with it.
#pragma once

#include <cstddef>
#include <cstdint>

class Pool;

// One thread's view of a call. All threads go through the same loops over `share` in the same order.
class Team {
   public:
    // for (int64_t i : team.share(count)): all threads together take each of 0 to `count` once, in this order. The loop ends
    // when all are done, in every thread, and must not be left earlier. Threads see what others wrote in earlier loops.
    class Shares {
       public:
        class Turn {
           public:
            Turn(Team& team, int64_t count) : team_(team), count_(count), at_(team.claim(count)) {}
            int64_t operator*() const { return at_; }
            bool operator!=(std::nullptr_t) const { return at_ >= 0; }
            void operator++() {
                team_.finish(count_);
                at_ = team_.claim(count_);
            }

           private:
            Team& team_;
            int64_t count_, at_;
        };
        Shares(Team& team, int64_t count) : team_(team), count_(count) {}
        Turn begin() const { return {team_, count_}; }
        std::nullptr_t end() const { return nullptr; }

       private:
        Team& team_;
        int64_t count_;
    };
    Shares share(int64_t count) { return {*this, count}; }

   private:
    friend class Pool;
    explicit Team(Pool& pool) : pool_(pool) {}
    int64_t claim(int64_t count);
    void finish(int64_t count);

    Pool& pool_;
    uint32_t loop_ = 0;  // loops gone through
};

using Call = void (*)(const void* work, Team& team);
void run_together(int threads, Call call, const void* work);

// Calls work(Team&) in this thread and in up to `threads` - 1 others. Fewer come if they are late, or if the system
// refuses to start them.
template <class Work>
void together(int threads, const Work& work) {
    run_together(threads, [](const void* work, Team& team) { (*static_cast<const Work*>(work))(team); }, &work);
}
