// A launch: its blocks one after the other, their shared memory, and the arguments as the driver gets them.

#pragma once

#include <type_traits>
#include <utility>

#include "fibres.h"

namespace sim {

constexpr size_t SHARED = 228 << 10, MARGIN = 64;

// ---- shared memory ---------------------------------------------------------------------------------------

alignas(1024) inline unsigned char shared_memory[SHARED];
inline size_t shared_used, shared_most;
inline unsigned shared_epoch;
inline size_t margins[64];
inline int margin_count;

inline void add_margin() {
    if (margin_count == 64) fail("more than 63 shared arrays in one kernel");
    memset(shared_memory + shared_used, 0xff, MARGIN);
    margins[margin_count++] = shared_used;
    shared_used += MARGIN;
}

// One shared array: its place is found when a block first reaches it, and holds NaN until it is written.
struct Slot {
    unsigned epoch;
    void* place;
    template <typename Array>
    Array& get() {
        static_assert(alignof(Array) <= 1024, "alignment of a shared array");
        if (epoch != shared_epoch) {
            size_t align = alignof(Array) < 16 ? 16 : alignof(Array);
            size_t start = (shared_used + align - 1) / align * align;
            if (start + sizeof(Array) + MARGIN > SHARED) fail("shared arrays over 227 KiB");
            place = shared_memory + start;
            memset(place, 0xff, sizeof(Array));
            shared_used = start + sizeof(Array);
            shared_most += sizeof(Array);
            add_margin();
            epoch = shared_epoch;
        }
        return *static_cast<Array*>(place);
    }
};

inline void check_margins() {
    for (int i = 0; i < margin_count; i++) {
        for (size_t at = margins[i]; at < margins[i] + MARGIN; at++) {
            if (shared_memory[at] != 0xff) fail("a write behind the end of a __shared__ array");
        }
    }
}

// ---- launches --------------------------------------------------------------------------------------------

inline void run_block(bool reverse, unsigned dynamic) {
    shared_epoch++;
    margin_count = 0, shared_most = 0;
    shared_used = (dynamic + 15) / 16 * 16;
    memset(shared_memory, 0xff, shared_used);
    shared_used = dynamic;  // the margin begins where the launch's bytes end
    add_margin();
    for (int i = 0; i < thread_count; i++) threads[i].state = NEW;
    living = thread_count;
    arrived = barrier_votes = 0;
    while (living > 0) {
        bool moved = false;
        for (int i = 0; i < thread_count; i++) {
            int number = reverse ? thread_count - 1 - i : i;
            int state = threads[number].state;
            if (state == NEW || state == READY) {
                resume(number);
                moved = true;
            }
        }
        if (living > 0 && arrived == living) {
            release_barrier();
            moved = true;
        }
        if (!moved) {  // lanes that ended may have been all that the others waited for
            for (int i = 0; i < thread_count && !moved; i++)
                moved = threads[i].state == IN_WARP && complete_warp(i);
        }
        if (!moved) {
            int in_warp = 0;
            for (int i = 0; i < thread_count; i++) in_warp += threads[i].state == IN_WARP;
            fail("deadlock: %d threads wait at __syncthreads, %d for lanes of their warp, %d have ended", arrived,
                 in_warp, thread_count - living);
        }
    }
    check_margins();
}

inline void on_signal(int number, siginfo_t*, void* context) {
    snprintf(message, sizeof message, "%s [block (%u, %u, %u), thread (%u, %u, %u)]",
             number == SIGILL || number == SIGTRAP ? "misaligned access, or an index behind the end of an array"
             : number == SIGFPE ? "integer division by zero"
                                : "illegal memory access",
             blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
#if defined(__x86_64__) && defined(__linux__)
    fault_address = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#else
    (void)context;
#endif
    siglongjmp(escape, 1);
}

struct Signals {
    static constexpr int numbers[5] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    struct sigaction before[5];
    stack_t stack_before;
    char memory[32768];
    Signals() {
        stack_t own = {};
        own.ss_sp = memory;
        own.ss_size = sizeof memory;
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 5; i++) sigaction(numbers[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 5; i++) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

inline int launch(void (*run)(void**), const unsigned* grid, const unsigned* block, unsigned dynamic,
                  void** arguments, int reverse) {
    kernel = run, kernel_arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
    thread_count = int(block[0] * block[1] * block[2]);
    for (int i = 0; i < thread_count; i++) {
        unsigned n = unsigned(i);
        threads[i].index = {n % block[0], n / block[0] % block[1], n / block[0] / block[1]};
    }
    fault_address = nullptr;
    idle_count = stacks_made = 0;  // other libraries have used the stacks since
    Signals signals;
    if (sigsetjmp(escape, 1)) return 1;
    uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t n = reverse ? blocks - 1 - i : i;
        blockIdx = {unsigned(n % grid[0]), unsigned(n / grid[0] % grid[1]), unsigned(n / grid[0] / grid[1])};
        run_block(reverse, dynamic);
    }
    return 0;
}

// ---- the parameters of a kernel -----------------------------------------------------------------------------

// a letter and a size: what Python checks the arguments against
template <typename X>
struct Letter {
    static constexpr char value = std::is_same_v<X, bool>          ? 'b'
                                  : std::is_floating_point_v<X>    ? 'f'
                                  : !std::is_integral_v<X>         ? 's'
                                  : std::is_signed_v<X>            ? 'i'
                                                                   : 'u';
};

template <typename X>
int describe(char* to, size_t room) {
    if constexpr (std::is_pointer_v<X>) {
        using Full = std::remove_pointer_t<X>;
        using Pointed = std::remove_cv_t<Full>;
        char access = std::is_const_v<Full> ? 'c' : 'p';
        if constexpr (std::is_void_v<Pointed>) {
            return snprintf(to, room, " %cv0", access);
        } else {
            return snprintf(to, room, " %c%c%zu", access, Letter<Pointed>::value, sizeof(Pointed));
        }
    } else {
        return snprintf(to, room, " %c%zu", Letter<X>::value, sizeof(X));
    }
}

// A kernel that takes its arguments as the driver gets them: as an array of addresses.
template <auto F>
struct Entry;
template <typename... P, void (*F)(P...)>
struct Entry<F> {
    template <size_t... I>
    static void call(void** arguments, std::index_sequence<I...>) {
        (void)arguments;
        F(*static_cast<P*>(arguments[I])...);
    }
    static void run(void** arguments) { call(arguments, std::index_sequence_for<P...>()); }
    static void parameters(char* to, size_t room) {
        int used = 0;
        ((used += describe<P>(to + used, room - used)), ...);
        to[used] = 0;
    }
};

struct Kernel {
    const char* name;
    int most_threads;
    void (*run)(void**);
    void (*parameters)(char*, size_t);
};

}  // namespace sim
