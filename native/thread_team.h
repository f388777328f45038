// A team of threads for work in independent pieces: the caller's thread and a few workers, which sleep in between.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace trio {

class ThreadTeam {
public:
    // Starts this many workers besides the caller's thread, or fewer if the system has no more threads.
    explicit ThreadTeam(int32_t n_workers) {
        try {
            for (int32_t i = 0; i < n_workers; ++i)
                workers_.emplace_back([this, i] { work_until_closed(size_t(i) + 1); });
        } catch (const std::system_error &) {
        }
    }
    ~ThreadTeam() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
        }
        called_.notify_all();
        for (std::thread &worker : workers_)
            worker.join();
    }
    ThreadTeam(const ThreadTeam &) = delete;
    ThreadTeam &operator=(const ThreadTeam &) = delete;

    size_t size() const { return workers_.size() + 1; }

    // Calls work(piece, member) for every piece from 0 to n - 1. The caller's thread is member 0; workers are members
    // 1 to size() - 1. Returns when all pieces are done; a worker that wakes up too late for any is not waited for.
    // `work` must not throw.
    void run(int32_t n, const std::function<void(int32_t, size_t)> &work) {
        std::unique_lock<std::mutex> lock(mutex_);
        work_ = &work;
        n_ = n;
        next_ = n_done_ = 0;
        called_.notify_all();
        take_pieces(lock, 0);
        done_.wait(lock, [this] { return n_done_ == n_; });
    }

private:
    void take_pieces(std::unique_lock<std::mutex> &lock, size_t member) {
        while (next_ < n_) {
            const int32_t piece = next_++;
            const auto *work = work_;
            lock.unlock();
            (*work)(piece, member);
            lock.lock();
            ++n_done_;
        }
        if (n_done_ == n_) done_.notify_one();
    }

    void work_until_closed(size_t member) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            called_.wait(lock, [this] { return closing_ || next_ < n_; });
            if (closing_) return;
            take_pieces(lock, member);
        }
    }

    std::vector<std::thread> workers_;
    std::mutex mutex_; // guards all below
    std::condition_variable called_, done_;
    const std::function<void(int32_t, size_t)> *work_ = nullptr;
    int32_t n_ = 0, next_ = 0, n_done_ = 0; // pieces
    bool closing_ = false;
};

} // namespace trio
