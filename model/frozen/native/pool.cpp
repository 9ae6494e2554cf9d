// The pool of threads; pool.h explains its counters.
#include "pool.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <chrono>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int SPINS_IN_JOB = 100;    // about 5 us on a processor whose pause takes 140 cycles
constexpr int SPINS_BETWEEN = 400;   // the next step often begins at once
constexpr uint32_t JOBS = 1u << 24;  // jobs are numbered modulo this
constexpr uint64_t MOST_UNITS = (1u << 20) - 1;

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
    syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    if (word.load() == value) std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

uint64_t packed(uint32_t job, uint64_t units, uint64_t next) { return uint64_t(job) << 40 | units << 20 | next; }

}  // namespace

Pool::Pool(int count, int max_stages, Hook on_enter, Unhook on_leave)
    : num_threads(count), enter(on_enter), leave(on_leave), work(max_stages), left(max_stages) {
    for (int i = 1; i < num_threads; ++i) threads.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
    stopped.store(true);
    job.fetch_add(1);
    wake_all(job);
    for (std::thread& thread : threads) thread.join();
}

void Pool::run(const int* units, int stages, Unit function, void* data) {
    unit = function;
    context = data;
    uint32_t number = (job.load(std::memory_order_relaxed) + 1) % JOBS;
    first.store(passed.load(std::memory_order_relaxed), std::memory_order_relaxed);
    num_stages.store(uint32_t(stages), std::memory_order_relaxed);
    for (int stage = 0; stage < stages; ++stage) {
        left[stage].store(uint32_t(units[stage]), std::memory_order_relaxed);
        work[stage].store(packed(number, uint64_t(units[stage]), 0), std::memory_order_release);
    }
    job.store(number, std::memory_order_seq_cst);
    if (num_threads > 1) wake_all(job);
    take_part(number, 0);
    await(number, first.load(std::memory_order_relaxed) + uint32_t(stages));
}

void Pool::serve(int thread) {
    for (uint32_t seen = 0;;) {
        uint32_t number = job.load(std::memory_order_acquire);
        for (int i = 0; number == seen && i < SPINS_BETWEEN; ++i) {
            pause_briefly();
            number = job.load(std::memory_order_acquire);
        }
        while (number == seen) {
            sleep_while(job, seen);
            number = job.load(std::memory_order_acquire);
        }
        if (stopped.load()) return;
        seen = number;
        take_part(number, thread);
    }
}

void Pool::take_part(uint32_t number, int thread) {
    // If the next job begins now, these may be the numbers of that job: then `await` or `work` shows it.
    uint32_t begin = first.load(std::memory_order_relaxed), stages = num_stages.load(std::memory_order_relaxed);
    uint32_t before = enter();
    for (uint32_t stage = 0; stage < stages; ++stage) {
        if (!await(number, begin + stage)) break;
        std::atomic<uint64_t>& word = work[stage];
        for (uint64_t now = word.load(std::memory_order_acquire);;) {
            uint64_t units = now >> 20 & MOST_UNITS, next = now & MOST_UNITS;
            if (now >> 40 != number || next == units) break;
            if (!word.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            unit(context, int(stage), int(next), thread);
            if (left[stage].fetch_sub(1, std::memory_order_acq_rel) == 1) {
                passed.fetch_add(1, std::memory_order_seq_cst);
                if (sleepers.load(std::memory_order_seq_cst)) wake_all(passed);
            }
            now = word.load(std::memory_order_acquire);
        }
    }
    leave(before);
}

// Wait until `passed` reaches `wanted`. Returns false if another job has begun.
bool Pool::await(uint32_t number, uint32_t wanted) {
    for (int i = 0; i < SPINS_IN_JOB; ++i) {
        if (int32_t(passed.load(std::memory_order_acquire) - wanted) >= 0) return true;
        if (job.load(std::memory_order_relaxed) != number) return false;
        pause_briefly();
    }
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    uint32_t now = passed.load(std::memory_order_seq_cst);
    while (int32_t(now - wanted) < 0 && job.load(std::memory_order_relaxed) == number) {
        sleep_while(passed, now);
        now = passed.load(std::memory_order_seq_cst);
    }
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
    return int32_t(now - wanted) >= 0;
}
