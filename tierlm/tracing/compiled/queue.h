// Records in order, as an OrderedDict without values.
#pragma once

#include <vector>

constexpr int NONE = -1;

// Of the records 0 to n - 1, each at most once. All is O(1) but for find and trim.
class Queue {
    std::vector<int> next, prev;  // circles that go through end(); NONE: not in the queue
    int count = 0;

public:
    explicit Queue(int records) : next(records + 1, NONE), prev(records + 1, NONE) {
        next[records] = prev[records] = records;
    }
    int end() const { return int(next.size()) - 1; }
    int first() const { return next[end()]; }
    int after(int id) const { return next[id]; }
    int size() const { return count; }
    bool contains(int id) const { return next[id] != NONE; }

    void push(int id) {  // which is not in it, to the end
        int last = prev[end()];
        next[last] = prev[end()] = id;
        prev[id] = last, next[id] = end();
        ++count;
    }
    void erase(int id) {
        next[prev[id]] = next[id];
        prev[next[id]] = prev[id];
        next[id] = prev[id] = NONE;
        --count;
    }
    void discard(int id) {
        if (contains(id)) erase(id);
    }
    void move_to_end(int id) {
        erase(id);
        push(id);
    }
    int pop() {
        int id = first();
        erase(id);
        return id;
    }
    void trim(int limit) {
        while (count > 0 && count > limit) pop();
    }
    template <class Wanted>
    int find(Wanted wanted) const {  // the first that is wanted, or NONE
        for (int id = first(); id != end(); id = next[id])
            if (wanted(id)) return id;
        return NONE;
    }
};
