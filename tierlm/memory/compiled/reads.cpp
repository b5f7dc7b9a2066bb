// File reads by native threads that need no GIL: an executor of tierlm/memory/transfer.py.
// A failure is reported without its cause; Python repeats the read to find it.

#include <pthread.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../../layout.h"
#include "populator.h"

namespace {

constexpr int PRIORITIES = 3, DEMAND = 0, PREFETCH = 1, WARM_UP = 2;
constexpr int64_t ALIGNMENT = 4096;  // of direct reads; no page is smaller
constexpr double RECENT = 0.1;  // seconds after a demand in which warm-up keeps to the spare threads
constexpr size_t MERGE_WINDOW = 64;  // queued reads to search for adjacent ones

double seconds(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

// From Python (compiled/__init__.py): of `length` bytes, `wanted` must arrive; `at` is the offset in the slot.
struct Request {
    int64_t file, offset, wanted, length, at;
};

struct Ticket;

struct Read {
    Request request;
    char* target;
    Ticket* ticket;
    double began = 0, ended = 0;
    int lane = 0;  // the thread that ran it
    bool done = false;

    int64_t end() const { return request.offset + request.length; }
};

struct Ticket {
    int64_t number;
    int priority;
    bool announced;  // call Python when it ends
    char *begin, *end;  // the memory that it fills
    bool cold = false;  // to be populated before its reads are queued
    bool begun = false, failed = false;
    size_t pending = 0;
    std::vector<Read> reads;  // none: its memory is only populated
};

bool read_one(const Read& read) {
    const Request& request = read.request;
    int64_t got = 0;
    while (got < request.wanted) {
        const iovec target{read.target + got, size_t(request.length - got)};
        const ssize_t count = preadv(int(request.file), &target, 1, request.offset + got);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        got += count;
    }
    return got >= request.wanted;
}

// Reads adjacent requests as one. A page shared by two is read into the first and copied to the second.
bool read_together(const std::vector<Read*>& reads) {
    const int64_t begin = reads[0]->request.offset;
    std::vector<iovec> targets;
    int64_t end = begin, wanted = 0;
    for (const Read* read : reads) {
        const int64_t shared = end - read->request.offset;
        targets.push_back({read->target + shared, size_t(read->request.length - shared)});
        wanted = std::max(wanted, read->request.offset + read->request.wanted - begin);
        end = read->end();
    }
    if (preadv(int(reads[0]->request.file), targets.data(), int(targets.size()), begin) < wanted) return false;
    for (size_t i = 1; i < reads.size(); ++i) {
        const int64_t shared = reads[i - 1]->end() - reads[i]->request.offset;
        memcpy(reads[i]->target, reads[i - 1]->target + reads[i - 1]->request.length - shared, size_t(shared));
    }
    return true;
}

class Reads {
    std::mutex mutex;
    std::condition_variable work, changed;
    std::deque<Read*> queues[PRIORITIES];
    std::deque<Ticket*> cold;  // warm-ups, the most wanted first, and memory to populate: not populated yet
    std::map<int64_t, std::unique_ptr<Ticket>> tickets;  // not yet collected by Python
    std::deque<Ticket*> ended;
    std::vector<std::thread> threads;
    std::unique_ptr<Populator> populator;
    std::thread dispatcher;  // gives work to the populator, whose threads take no lock
    int64_t* const over;  // ended tickets plus wakes; Python polls it
    void (*const announce)();
    const int64_t merged_bytes;
    int64_t last_number = 0, bytes = 0;
    const int spare;
    int running, active = 0, demands = 0;  // threads: alive, in a read, in the read of a demand
    double busy = 0, since = 0, cpu = 0, demanded = 0;
    bool closed = false;

    std::deque<Read*>* next() {
        const bool lane = active - demands < spare;
        if (!queues[DEMAND].empty()) return &queues[DEMAND];
        if (!queues[PREFETCH].empty() && lane) return &queues[PREFETCH];
        if (queues[WARM_UP].empty() || demands) return nullptr;
        if (first_cold() < queues[WARM_UP].front()->ticket->number) return nullptr;
        return lane || seconds(CLOCK_MONOTONIC) - demanded > RECENT ? &queues[WARM_UP] : nullptr;
    }

    // The most wanted ticket whose memory is not populated yet.
    int64_t first_cold() const {
        const int64_t given = populator ? populator->first() : INT64_MAX;
        return cold.empty() ? given : std::min(given, cold.front()->number);
    }

    // Waits for a read. A warm-up may have to wait until the last demand is no longer recent.
    std::deque<Read*>* await(std::unique_lock<std::mutex>& lock) {
        std::deque<Read*>* queue = nullptr;
        while (!closed && !(queue = next())) {
            if (queues[WARM_UP].empty())
                work.wait(lock);
            else
                work.wait_for(lock, std::chrono::duration<double>(RECENT));
        }
        return queue;
    }

    bool follows(const Read& first, const Read& last, const Read& read) const {
        const int64_t shared = last.end() - read.request.offset;
        return !read.ticket->failed && read.request.file == last.request.file && (shared == 0 || shared == ALIGNMENT) &&
               read.end() - first.request.offset <= merged_bytes;
    }

    // Takes adjacent reads, but no more than a thread's share: idle threads do small reads faster side by side.
    std::vector<Read*> take(std::deque<Read*>& queue) {
        std::vector<Read*> taken{queue.front()};
        queue.pop_front();
        const size_t share = taken[0]->ticket->failed ? 1 : 1 + queue.size() / threads.size();
        size_t i = 0;
        for (size_t looked = 0; looked < MERGE_WINDOW && i < queue.size() && taken.size() < share; ++looked) {
            if (follows(*taken.front(), *taken.back(), *queue[i])) {
                taken.push_back(queue[i]);
                queue.erase(queue.begin() + i);
            } else {
                ++i;
            }
        }
        for (Read* read : taken) read->ticket->begun = true;
        return taken;
    }

    void count() {
        __atomic_add_fetch(over, 1, __ATOMIC_RELEASE);
        changed.notify_all();
    }

    void run(int lane) {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            std::deque<Read*>* queue = await(lock);
            if (closed) break;
            const std::vector<Read*> reads = take(*queue);
            const bool demand = reads[0]->ticket->priority == DEMAND, skip = reads[0]->ticket->failed;
            demands += demand;
            const double began = seconds(CLOCK_MONOTONIC), cpu_began = seconds(CLOCK_THREAD_CPUTIME_ID);
            if (!active++) since = began;
            lock.unlock();
            std::vector<char> good(reads.size(), !skip);
            if (!skip && (reads.size() == 1 || !read_together(reads)))
                for (size_t i = 0; i < reads.size(); ++i) good[i] = read_one(*reads[i]);
            lock.lock();
            const double now = seconds(CLOCK_MONOTONIC);
            cpu += seconds(CLOCK_THREAD_CPUTIME_ID) - cpu_began;
            if (!--active) busy += now - since;
            if (demand) demanded = now;
            if (!demand)
                work.notify_one();
            else if (!--demands)
                work.notify_all();  // warm-ups may begin
            bool call = false;
            for (size_t i = 0; i < reads.size(); ++i) {
                Read& read = *reads[i];
                Ticket& ticket = *read.ticket;
                read.began = began, read.ended = now, read.lane = lane, read.done = true;
                ticket.failed |= !good[i];
                if (good[i]) bytes += read.request.length;
                if (--ticket.pending) continue;
                ended.push_back(&ticket);
                call |= ticket.announced;
                count();
            }
            if (call && !closed) {  // once closed, Python may be gone
                lock.unlock();
                announce();
                lock.lock();
            }
        }
        --running;
        changed.notify_all();
    }

    // Has the memory of warm-ups populated, which are read afterwards. While demands arrive, the least wanted warm-up
    // comes first: its slot is the next that a demand takes.
    void dispatch() {
        std::unique_lock<std::mutex> lock(mutex);
        while (!closed) {
            while (const int64_t number = populator->take_done()) populated(*find(number));
            while (!cold.empty()) {
                const bool demanding = demands || !queues[DEMAND].empty();
                const auto next = demanding && !cold.back()->reads.empty() ? cold.end() - 1 : cold.begin();
                if (!populator->give((*next)->number, (*next)->begin, (*next)->end)) break;
                cold.erase(next);
            }
            lock.unlock();
            populator->wait();
            lock.lock();
        }
    }

    void populated(Ticket& ticket) {
        ticket.cold = false;
        if (ticket.reads.empty()) {
            tickets.erase(ticket.number);
            return;
        }
        std::deque<Read*>& queue = queues[WARM_UP];
        auto place = queue.end();
        while (place != queue.begin() && (*(place - 1))->ticket->number > ticket.number) --place;
        for (Read& read : ticket.reads) place = queue.insert(place, &read) + 1;
        work.notify_all();
    }

    Ticket* find(int64_t number) {
        const auto found = tickets.find(number);
        return found == tickets.end() ? nullptr : found->second.get();
    }

    // Removes and returns the reads of a ticket that have not begun.
    std::vector<Read*> unqueue(Ticket& ticket) {
        std::vector<Read*> found;
        if (ticket.cold) {
            ticket.cold = false;
            cold.erase(std::remove(cold.begin(), cold.end(), &ticket), cold.end());
            if (populator) populator->stop(ticket.number);
            for (Read& read : ticket.reads) found.push_back(&read);
            return found;
        }
        std::deque<Read*>& queue = queues[ticket.priority];
        for (Read* read : queue)
            if (read->ticket == &ticket) found.push_back(read);
        const auto own = [&](const Read* read) { return read->ticket == &ticket; };
        queue.erase(std::remove_if(queue.begin(), queue.end(), own), queue.end());
        return found;
    }

    int64_t to_populate(std::unique_ptr<Ticket> ticket) {
        const int64_t number = ticket->number;
        cold.push_back(ticket.get());
        tickets[number] = std::move(ticket);
        populator->wake();
        return number;
    }

    void join() {
        for (std::thread& thread : threads) thread.join();
        threads.clear();
        if (!populator) return;
        populator->wake();
        if (dispatcher.joinable()) dispatcher.join();
        populator.reset();
    }

public:
    // Throws if the system refuses a thread; no other is left then.
    Reads(int count, int spare, int touching, int64_t merged_bytes, int64_t* over, void (*announce)())
        : over(over), announce(announce), merged_bytes(merged_bytes), spare(spare), running(count) {
        sigset_t all, before;  // Python handles signals
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        std::unique_lock<std::mutex> lock(mutex);
        try {
            for (int i = 0; i < count; ++i) {
                threads.emplace_back([this, i] { run(i); });
                pthread_setname_np(threads.back().native_handle(), "tierlm-read");
            }
            if (touching) {
                populator = std::make_unique<Populator>(touching);
                dispatcher = std::thread([this] { dispatch(); });
                pthread_setname_np(dispatcher.native_handle(), "tierlm-populate");
            }
        } catch (...) {
            closed = true;
            lock.unlock();
            join();
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    int64_t submit(int priority, const Request* requests, size_t count, char* base, bool announced, bool first) {
        const std::lock_guard<std::mutex> lock(mutex);
        std::unique_ptr<Ticket> ticket(new Ticket{++last_number, priority, announced, base, base});
        ticket->pending = count;
        ticket->cold = priority == WARM_UP && populator;
        for (size_t i = 0; i < count; ++i) {
            ticket->reads.push_back({requests[i], base + requests[i].at, ticket.get()});
            ticket->end = std::max(ticket->end, ticket->reads.back().target + requests[i].length);
        }
        if (ticket->cold) return to_populate(std::move(ticket));
        std::deque<Read*>& queue = queues[priority];
        auto place = first ? queue.begin() : queue.end();
        for (Read& read : ticket->reads) {
            place = queue.insert(place, &read) + 1;
            work.notify_one();
        }
        tickets[last_number] = std::move(ticket);
        return last_number;
    }

    // Populates memory when processors idle; `cancel` ends it, but for at most one page per thread. Returns its number.
    int64_t populate_later(char* base, int64_t nbytes) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!populator) return 0;
        return to_populate(std::unique_ptr<Ticket>(new Ticket{++last_number, WARM_UP, false, base, base + nbytes, true}));
    }

    void promote(int64_t number) {
        const std::lock_guard<std::mutex> lock(mutex);
        Ticket* ticket = find(number);
        if (!ticket || ticket->priority == DEMAND) return;
        const std::vector<Read*> waiting = unqueue(*ticket);
        ticket->priority = DEMAND;
        for (Read* read : waiting) {
            queues[DEMAND].push_back(read);
            work.notify_one();  // all threads for prefetch may be busy
        }
    }

    bool cancel(int64_t number) {
        const std::lock_guard<std::mutex> lock(mutex);
        Ticket* ticket = find(number);
        if (!ticket || ticket->begun) return false;
        unqueue(*ticket);
        tickets.erase(number);
        return true;
    }

    void announce_end(int64_t number) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (Ticket* ticket = find(number)) ticket->announced = true;
    }

    // The next ended ticket: its number, negated if it failed, or 0 if none is left. Fills `times` with begin, end and
    // thread of its first `room` reads.
    int64_t next_ended(double* times, size_t room) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (ended.empty()) return 0;
        const Ticket* ticket = ended.front();
        ended.pop_front();
        for (size_t i = 0; i < std::min(room, ticket->reads.size()); ++i) {
            *times++ = ticket->reads[i].began;
            *times++ = ticket->reads[i].ended;
            *times++ = ticket->reads[i].lane;
        }
        const int64_t number = ticket->failed ? -ticket->number : ticket->number;
        tickets.erase(ticket->number);
        return number;
    }

    // Index of the first unfinished read of a ticket, or -1.
    int64_t unfinished(int64_t number) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (const Ticket* ticket = find(number))
            for (size_t i = 0; i < ticket->reads.size(); ++i)
                if (!ticket->reads[i].done) return int64_t(i);
        return -1;
    }

    void wait(int64_t seen, double timeout) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait_for(lock, std::chrono::duration<double>(timeout), [&] { return *over != seen; });
    }

    void wake() {
        const std::lock_guard<std::mutex> lock(mutex);
        count();
    }

    // moved: bytes read, bytes of queued demands. spent: seconds busy, CPU seconds.
    void stats(int64_t* moved, double* spent) {
        const std::lock_guard<std::mutex> lock(mutex);
        moved[0] = bytes;
        moved[1] = 0;
        for (const Read* read : queues[DEMAND]) moved[1] += read->request.length;
        spent[0] = busy + (active ? seconds(CLOCK_MONOTONIC) - since : 0);
        spent[1] = cpu;
    }

    // Finishes reads in progress and drops the rest. False if a thread is stuck in a read.
    bool close(double timeout) {
        {
            std::unique_lock<std::mutex> lock(mutex);
            closed = true;
            work.notify_all();
            const auto through = [&] { return !running; };
            if (!changed.wait_for(lock, std::chrono::duration<double>(timeout), through)) return false;
        }
        join();
        return true;
    }
};

}  // namespace

LAYOUT(Request, FIELD(file), FIELD(offset), FIELD(wanted), FIELD(length), FIELD(at))

extern "C" {

// Null if the system refuses a thread.
Reads* tierlm_reads_open(int threads, int spare, int touching, int64_t merged_bytes, int64_t* over,
                         void (*announce)()) {
    try {
        return new Reads(threads, spare, touching, merged_bytes, over, announce);
    } catch (...) {
        return nullptr;
    }
}

int64_t tierlm_reads_submit(Reads* reads, int priority, const Request* requests, int64_t count, char* base, int announced,
                            int first) {
    return reads->submit(priority, requests, size_t(count), base, announced, first);
}

int64_t tierlm_reads_populate(Reads* reads, char* base, int64_t nbytes) { return reads->populate_later(base, nbytes); }

void tierlm_reads_promote(Reads* reads, int64_t number) { reads->promote(number); }

int tierlm_reads_cancel(Reads* reads, int64_t number) { return reads->cancel(number); }

void tierlm_reads_announce(Reads* reads, int64_t number) { reads->announce_end(number); }

int64_t tierlm_reads_next_ended(Reads* reads, double* times, int64_t room) {
    return reads->next_ended(times, size_t(room));
}

int64_t tierlm_reads_unfinished(Reads* reads, int64_t number) { return reads->unfinished(number); }

void tierlm_reads_wait(Reads* reads, int64_t seen, double timeout) { reads->wait(seen, timeout); }

void tierlm_reads_wake(Reads* reads) { reads->wake(); }

void tierlm_reads_stats(Reads* reads, int64_t* moved, double* spent) { reads->stats(moved, spent); }

int tierlm_reads_close(Reads* reads, double timeout) { return reads->close(timeout); }

void tierlm_reads_free(Reads* reads, double timeout) {
    if (reads->close(timeout)) delete reads;
}
}
