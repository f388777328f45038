// What this machine can do, as the limit of what kernels can reach: GB/s of reads from memory, and products of bytes
// and of floats that are added up, in GMAC/s. Prints JSON, with a figure for each number of threads.
//
//   cc -O3 -march=native -pthread ci/limits.c -o limits && ./limits 1 2
//
// Each figure is the best of some tries, since a limit is what nothing disturbs.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { MAX_THREADS = 256, TRIES = 20, ROUNDS = 20 * 1000 * 1000 };
static const size_t SIZE = (size_t)256 << 20; // bytes for each thread: more than any cache

typedef struct {
    const uint64_t *memory;
    uint64_t sum; // whatever was computed, so that no compiler leaves it out
    double work;
} Job;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void *read_memory(void *argument) {
    Job *job = argument;
    uint64_t sums[16] = {0};
    for (size_t i = 0; i < SIZE / 8; i += 16)
        for (int j = 0; j < 16; j++)
            sums[j] += job->memory[i + j];
    for (int j = 0; j < 16; j++)
        job->sum += sums[j];
    job->work = (double)SIZE;
    return NULL;
}

// The quickest instructions for products of bytes. Without VNNI, sums are of 16 bits, which is enough for a few products
// of 4-bit weights only: kernels for wider weights cannot reach that.
#if defined(__AVX512VNNI__)
#define BYTES_VECTOR __m512i
#define BYTES_START(n) _mm512_set1_epi32(n)
#define BYTES_ADD(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
enum { BYTES = 64, BYTES_CHAINS = 10 };
#elif defined(__AVXVNNI__)
#define BYTES_VECTOR __m256i
#define BYTES_START(n) _mm256_set1_epi32(n)
#define BYTES_ADD(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
enum { BYTES = 32, BYTES_CHAINS = 10 };
#elif defined(__AVX2__)
#define BYTES_VECTOR __m256i
#define BYTES_START(n) _mm256_set1_epi8(n)
#define BYTES_ADD(sum, a, b) _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b))
enum { BYTES = 32, BYTES_CHAINS = 6 }; // each needs two registers, of 16
#elif defined(__ARM_FEATURE_DOTPROD)
#define BYTES_VECTOR int32x4_t
#define BYTES_START(n) vdupq_n_s32(n)
#define BYTES_ADD(sum, a, b) vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))
enum { BYTES = 16, BYTES_CHAINS = 10 };
#endif

#if defined(__AVX512F__)
#define FLOATS_VECTOR __m512
#define FLOATS_START(x) _mm512_set1_ps(x)
#define FLOATS_ADD(sum, a, b) _mm512_fmadd_ps(a, b, sum)
enum { FLOATS = 16, FLOATS_CHAINS = 10 };
#elif defined(__FMA__)
#define FLOATS_VECTOR __m256
#define FLOATS_START(x) _mm256_set1_ps(x)
#define FLOATS_ADD(sum, a, b) _mm256_fmadd_ps(a, b, sum)
enum { FLOATS = 8, FLOATS_CHAINS = 10 };
#elif defined(__ARM_NEON)
#define FLOATS_VECTOR float32x4_t
#define FLOATS_START(x) vdupq_n_f32(x)
#define FLOATS_ADD(sum, a, b) vfmaq_f32(sum, a, b)
enum { FLOATS = 4, FLOATS_CHAINS = 10 };
#endif

#if defined(__ARM_NEON)
#define KEEP(vector) "+w"(vector)
#else
#define KEEP(vector) "+x"(vector)
#endif

// Several chains of sums, so that none waits for its last addition. The inputs change, or they would be computed once.
#define MULTIPLY(NAME, VECTOR, START, ADD, LANES, CHAINS)                                                              \
    static void *NAME(void *argument) {                                                                                \
        Job *job = argument;                                                                                           \
        VECTOR sums[CHAINS], a = START(1), b = START(2);                                                               \
        for (int j = 0; j < CHAINS; j++)                                                                               \
            sums[j] = START(j);                                                                                        \
        for (long i = 0; i < ROUNDS / CHAINS; i++)                                                                     \
            for (int j = 0; j < CHAINS; j++) {                                                                         \
                __asm__("" : KEEP(a), KEEP(b));                                                                        \
                sums[j] = ADD(sums[j], a, b);                                                                          \
            }                                                                                                          \
        for (int j = 0; j < CHAINS; j++) {                                                                             \
            uint64_t word;                                                                                             \
            memcpy(&word, &sums[j], sizeof word);                                                                      \
            job->sum += word;                                                                                          \
        }                                                                                                              \
        job->work = (double)LANES * (ROUNDS / CHAINS) * CHAINS;                                                        \
        return NULL;                                                                                                   \
    }

#ifdef BYTES_VECTOR
MULTIPLY(multiply_bytes, BYTES_VECTOR, BYTES_START, BYTES_ADD, BYTES, BYTES_CHAINS)
#else
#define multiply_bytes NULL
#endif
#ifdef FLOATS_VECTOR
MULTIPLY(multiply_floats, FLOATS_VECTOR, FLOATS_START, FLOATS_ADD, FLOATS, FLOATS_CHAINS)
#else
#define multiply_floats NULL
#endif

// The most work per second, in billions, that `n` threads do together. `memory` has a part for each.
static double best(void *(*work)(void *), int n, const uint64_t *memory) {
    double most = 0;
    for (int i = 0; i < TRIES; i++) {
        pthread_t threads[MAX_THREADS];
        Job jobs[MAX_THREADS] = {{0}};
        double done = 0, started = now();
        for (int j = 0; j < n; j++) {
            jobs[j].memory = memory + SIZE / 8 * j;
            pthread_create(&threads[j], NULL, work, &jobs[j]);
        }
        for (int j = 0; j < n; j++) {
            pthread_join(threads[j], NULL);
            done += jobs[j].work;
        }
        double rate = done / (now() - started) / 1e9;
        most = rate > most ? rate : most;
    }
    return most;
}

int main(int count, char **arguments) {
    struct {
        const char *name;
        void *(*work)(void *);
    } kinds[] = {{"reads", read_memory}, {"int8", multiply_bytes}, {"f32", multiply_floats}};
    int most = 1;
    for (int i = 1; i < count; i++) {
        int n = atoi(arguments[i]);
        if (n < 1 || n > MAX_THREADS) {
            fprintf(stderr, "%s is not a number of threads from 1 to %d\n", arguments[i], MAX_THREADS);
            return 2;
        }
        most = n > most ? n : most;
    }
    uint64_t *memory = malloc(SIZE * most);
    if (memory == NULL) {
        fprintf(stderr, "there is too little memory\n");
        return 1;
    }
    memset(memory, 1, SIZE * most); // or all its pages would be the same one, full of zeros
    for (int kind = 0; kind < 3; kind++) {
        printf("%s\"%s\": {", kind ? ", " : "{", kinds[kind].name);
        for (int i = 1; i < count && kinds[kind].work != NULL; i++) {
            int n = atoi(arguments[i]);
            printf("%s\"%d\": %.2f", i > 1 ? ", " : "", n, best(kinds[kind].work, n, memory));
        }
        printf("}");
    }
    printf("}\n");
    free(memory);
    return 0;
}
