// The convolution of images with a long kernel, its gradients, and autocorrelations, on a CPU: for ../cpu.py.
//
// A real sequence of at most n positions is a polynomial modulo z^n - i. A product of two of them is their convolution:
// its first n positions are the real parts, and what would wrap round goes to the imaginary parts or changes its sign,
// since z^2n = -1; so nothing has to be padded. The polynomial's values where z^n = i are the complex Fourier transform
// of length n of u[t] * zeta^t, zeta = e^(i pi / 2n): the "right-angle" transform of Crandall and Fagin (Discrete
// weighted transforms and large-integer arithmetic, 1994).
//
// transform.h and tasks.h are included once for each instruction set and type of numbers. Nothing is checked here.

#include <stdint.h>

// What to do. Sizes count numbers. cpu.py has the same fields, in this order.
struct Job {
    const void *x, *grad;     // images (images, channels, ...), gradients (images, branches * channels, ...)
    const void *kernel;       // (branches * channels, 2 * reach + 1)
    const void *bias, *mean;  // (branches * channels) or none, (channels)
    void *y, *rows;           // results: images, and rows, one for each kernel or channel
    void *partial;            // spectra summed over the images of each chunk
    void *scratch;            // of every thread
    const void *twiddles;     // of each pass, [j][a - 1][re, im] = e^(-2 pi i j a / (radix * m))
    const void *zeta;         // [t][re, im] = e^(i pi t / 2n)
    const int32_t *pixel_of;  // the pixel at each of the n positions, or -1
    int64_t n, passes, radix[32];
    int64_t images, chunk, pixels;  // images in all and in a chunk, pixels of an image
    int64_t channels, branches;
    int64_t channels_last;  // whether images are (images, pixels, channels)
    int64_t reach;          // largest lag
    int64_t threads;        // at most so many
    int64_t scratch_bytes;  // of a thread
    int64_t vector_bytes;   // the instruction set, by its vectors
};

// What a block does to the features (rows, columns) between its products of matrices, of float.
struct Features {
    const void *x;         // (rows, columns), of a product
    const void *bias;      // (columns)
    void *y;               // result, (rows, columns)
    void *grad;            // (rows, columns), of a backward pass
    const void *shortcut;  // (rows, columns), as the next two of a residual
    const void *gamma;     // (columns)
    const void *scale;     // (rows), or none
    int64_t rows, columns, threads, vector_bytes;
};

// Functions of the OpenMP runtime that PyTorch has loaded.
static void (*start_team)(void (*)(void *), void *, unsigned, unsigned);
static int (*team_size)(), (*team_member)();

// What this thread does of so many units of work.
struct Share {
    int64_t member, from, to;

    Share(int64_t threads, int64_t units) : member(threads > 1 ? team_member() : 0) {
        int64_t size = threads > 1 ? team_size() : 1;
        from = units * member / size, to = units * (member + 1) / size;
    }
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static constexpr double PI = 3.14159265358979323846;

// cos and sin of 2 pi k / r, by their series for angles up to pi / 4.
static constexpr double cosine(int k, int r) {
    k = k % r;
    if (2 * k > r) k = r - k;
    if (4 * k > r) return -cosine(r - 2 * k, 2 * r);
    bool small = 8 * k <= r;
    double x = small ? 2 * PI * k / r : 2 * PI * (r - 4 * k) / (4 * r);
    double term = small ? 1 : x, sum = term;
    for (int i = small ? 1 : 2; i < 24; i += 2) term *= -x * x / (i * (i + 1)), sum += term;
    return sum;
}
static constexpr double sine(int k, int r) { return cosine(4 * k + 3 * r, 4 * r); }

#define INLINE static inline __attribute__((always_inline)) TARGET

#if defined(__x86_64__)

#define VECTOR_BYTES 64
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
namespace avx512_float {
typedef float Real;
typedef int32_t Index;
#include "transform.h"
#include "tasks.h"
#include "pointwise.h"
}  // namespace avx512_float
namespace avx512_double {
typedef double Real;
typedef int64_t Index;
#include "transform.h"
#include "tasks.h"
}  // namespace avx512_double
#undef VECTOR_BYTES
#undef TARGET

#define VECTOR_BYTES 32
#define TARGET __attribute__((target("avx2,fma")))
namespace avx2_float {
typedef float Real;
typedef int32_t Index;
#include "transform.h"
#include "tasks.h"
#include "pointwise.h"
}  // namespace avx2_float
namespace avx2_double {
typedef double Real;
typedef int64_t Index;
#include "transform.h"
#include "tasks.h"
}  // namespace avx2_double
#undef VECTOR_BYTES
#undef TARGET

#endif

#define VECTOR_BYTES 16
#define TARGET
namespace any_float {
typedef float Real;
typedef int32_t Index;
#include "transform.h"
#include "tasks.h"
#include "pointwise.h"
}  // namespace any_float
namespace any_double {
typedef double Real;
typedef int64_t Index;
#include "transform.h"
#include "tasks.h"
}  // namespace any_double

// What cpu.py calls.

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t job_bytes() { return sizeof(Job); }

// Returns the bytes of the widest vectors that this processor has and that this file knows.
EXPORT int64_t widest_vector() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return 64;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
    return 16;
}

// Takes GOMP_parallel, omp_get_num_threads and omp_get_thread_num. Without them a job must have one thread.
EXPORT void use_openmp(void *start, void *size, void *member) {
    start_team = (void (*)(void (*)(void *), void *, unsigned, unsigned))start;
    team_size = (int (*)())size;
    team_member = (int (*)())member;
}

template <class Job>
static void run(void (*task)(const Job *), const Job *job) {
    if (job->threads > 1)
        start_team((void (*)(void *))task, (void *)job, (unsigned)job->threads, 0);
    else
        task(job);
}

#if defined(__x86_64__)
#define RUN(task, type)                                 \
    run(job->vector_bytes == 64   ? avx512_##type::task \
        : job->vector_bytes == 32 ? avx2_##type::task   \
                                  : any_##type::task,   \
        job)
#else
#define RUN(task, type) run(any_##type::task, job)
#endif
#define OPERATIONS(type)                                                        \
    EXPORT void convolve_##type(const Job *job) { RUN(convolve, type); }        \
    EXPORT void convolve_backward_##type(const Job *job) {                      \
        RUN(gradients, type);                                                   \
        RUN(kernel_gradients, type);                                            \
    }                                                                           \
    EXPORT void power_##type(const Job *job) {                                  \
        RUN(powers, type);                                                      \
        RUN(sums_of_powers, type);                                              \
    }                                                                           \
    EXPORT void correlation_##type(const Job *job) { RUN(correlations, type); }
OPERATIONS(float)
OPERATIONS(double)

EXPORT void bias_gelu(const Features *job) { RUN(bias_gelu, float); }
EXPORT void bias_gelu_backward(const Features *job) { RUN(bias_gelu_backward, float); }
EXPORT void residual(const Features *job) { RUN(residual, float); }
