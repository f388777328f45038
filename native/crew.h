// A few threads that sleep until there is work in independent pieces.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace trio {

class Crew {
public:
    // So many besides the caller's own; fewer where the system gives no more.
    explicit Crew(int32_t n_threads) {
        try {
            for (int32_t i = 0; i < n_threads; ++i)
                threads_.emplace_back([this, i] { live(size_t(i) + 1); });
        } catch (const std::system_error &) {
        }
    }
    ~Crew() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
        }
        called_.notify_all();
        for (std::thread &thread : threads_)
            thread.join();
    }
    Crew(const Crew &) = delete;
    Crew &operator=(const Crew &) = delete;

    size_t size() const { return threads_.size() + 1; }

    // Calls work(piece, member) for every piece below n, on the caller's thread, which is member 0, and on those of
    // others below size(). Returns when all are done; it does not wait for members that come too late to help. `work`
    // must not throw.
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

    void live(size_t member) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            called_.wait(lock, [this] { return ends_ || next_ < n_; });
            if (ends_) return;
            take_pieces(lock, member);
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_; // guards all below
    std::condition_variable called_, done_;
    const std::function<void(int32_t, size_t)> *work_ = nullptr;
    int32_t n_ = 0, next_ = 0, n_done_ = 0; // pieces
    bool ends_ = false;
};

} // namespace trio
