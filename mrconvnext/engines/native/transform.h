// The transform of sequences, and walks through it. Included once for each instruction set and type: Real, TARGET,
// VECTOR_BYTES.
//
// The lanes of a vector are the same position of as many channels. Transforms run in place, forwards by decimation in
// frequency and backwards by decimation in time, so that nothing is ever put in order; every pass but the first and the
// last goes block by block, each block through all further passes, so that it stays in the nearest cache.

constexpr int LANES = VECTOR_BYTES / sizeof(Real);
typedef Real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef Real unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(Real)), may_alias));
struct complex {
    vec re, im;
};

INLINE vec load(const Real *p) { return *(const unaligned *)p; }
INLINE void store(Real *p, vec v) { *(unaligned *)p = v; }
INLINE complex add(complex a, complex b) { return {a.re + b.re, a.im + b.im}; }
INLINE complex subtract(complex a, complex b) { return {a.re - b.re, a.im - b.im}; }
INLINE complex times(complex a, Real re, Real im) { return {a.re * re - a.im * im, a.re * im + a.im * re}; }
INLINE complex product(complex a, complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
INLINE complex conjugate_product(complex a, complex b) {  // a * conj(b)
    return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}

// Discrete Fourier transforms, with e^(sign 2 pi i / R), of x[0], x[S] ... x[(R - 1) S] to y.

template <int R, int sign, int k, int a>
INLINE void odd_terms(const complex *sum, const complex *difference, complex &even, complex &odd) {
    if constexpr (a <= R / 2) {
        constexpr Real c = cosine(a * k, R), s = sign * sine(a * k, R);
        even = {even.re + sum[a - 1].re * c, even.im + sum[a - 1].im * c};
        odd = {odd.re + difference[a - 1].re * s, odd.im + difference[a - 1].im * s};
        odd_terms<R, sign, k, a + 1>(sum, difference, even, odd);
    }
}

template <int R, int sign, int k>
INLINE void odd_outputs(complex x, const complex *sum, const complex *difference, complex *y) {
    if constexpr (k <= R / 2) {
        complex even = x, odd = {vec{}, vec{}};
        odd_terms<R, sign, k, 1>(sum, difference, even, odd);
        y[k] = {even.re - odd.im, even.im + odd.re};
        y[R - k] = {even.re + odd.im, even.im - odd.re};
        odd_outputs<R, sign, k + 1>(x, sum, difference, y);
    }
}

template <int R, int sign, int S>
INLINE void odd_dft(const complex *x, complex *y) {
    complex sum[R / 2], difference[R / 2];
    y[0] = x[0];
#pragma GCC unroll 8
    for (int a = 1; a <= R / 2; a++) {
        sum[a - 1] = add(x[a * S], x[(R - a) * S]);
        difference[a - 1] = subtract(x[a * S], x[(R - a) * S]);
        y[0] = add(y[0], sum[a - 1]);
    }
    odd_outputs<R, sign, 1>(x[0], sum, difference, y);
}

template <int R, int sign, int k>
INLINE void butterflies(const complex *even, const complex *odd, complex *y) {
    if constexpr (k < R / 2) {
        complex a = even[k], b = odd[k];
        if constexpr (4 * k == R || k == 0) {
            if (k) b = sign > 0 ? complex{-b.im, b.re} : complex{b.im, -b.re};
            y[k] = add(a, b);
            y[k + R / 2] = subtract(a, b);
        } else {  // times c + is = c (1 + is / c): all are multiply-adds
            constexpr Real c = cosine(k, R), tangent = sign * sine(k, R) / cosine(k, R);
            b = {b.re - b.im * tangent, b.im + b.re * tangent};
            y[k] = {a.re + b.re * c, a.im + b.im * c};
            y[k + R / 2] = {a.re - b.re * c, a.im - b.im * c};
        }
        butterflies<R, sign, k + 1>(even, odd, y);
    }
}

template <int R, int sign, int S = 1>
INLINE void dft(const complex *x, complex *y) {
    if constexpr (R == 1) {
        y[0] = x[0];
    } else if constexpr (R % 2) {
        odd_dft<R, sign, S>(x, y);
    } else {
        complex even[R / 2], odd[R / 2];
        dft<R / 2, sign, 2 * S>(x, even);
        dft<R / 2, sign, 2 * S>(x + S, odd);
        butterflies<R, sign, 0>(even, odd, y);
    }
}

// Passes. The first and the last one read and write something else than the transform's own buffer.

#define WITH_RADIX(radix, CALL)   \
    switch (radix) {              \
        case 2: return CALL(2);   \
        case 3: return CALL(3);   \
        case 4: return CALL(4);   \
        case 5: return CALL(5);   \
        case 7: return CALL(7);   \
        case 8: return CALL(8);   \
        default: return CALL(16); \
    }

struct Plan {
    const Job *job;
    const Real *twiddles[32];

    TARGET Plan(const Job *job) : job(job) {
        const Real *next = (const Real *)job->twiddles;
        int64_t m = job->n;
        for (int level = 0; level < job->passes; level++) {
            m /= job->radix[level];
            twiddles[level] = next;
            next += 2 * m * (job->radix[level] - 1);
        }
    }
};

// The first pass of a transform, of what ``source`` has at each position, times zeta^t.
template <int R, class Source>
static TARGET void first_pass(const Plan &plan, const Source &source, complex *z) {
    complex x[R], y[R];
    int64_t m = plan.job->n / R;
    const Real *w = plan.twiddles[0];
    for (int64_t j = 0; j < m; j++, w += 2 * (R - 1)) {
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) x[a] = source.at(j + a * m);
        dft<R, -1>(x, y);
        z[j] = y[0];
#pragma GCC unroll 16
        for (int a = 1; a < R; a++) z[j + a * m] = times(y[a], w[2 * a - 2], w[2 * a - 1]);
    }
}
template <class Source>
static TARGET void first(const Plan &plan, const Source &source, complex *z) {
#define CALL(R) first_pass<R>(plan, source, z)
    WITH_RADIX(plan.job->radix[0], CALL)
#undef CALL
}
// The last pass of an inverse transform; ``sink`` takes each position, still times zeta^t.
template <int R, class Sink>
static TARGET void last_pass(const Plan &plan, const complex *z, const Sink &sink) {
    complex x[R], y[R];
    int64_t m = plan.job->n / R;
    const Real *w = plan.twiddles[0];
    for (int64_t j = 0; j < m; j++, w += 2 * (R - 1)) {
        x[0] = z[j];
#pragma GCC unroll 16
        for (int a = 1; a < R; a++) x[a] = times(z[j + a * m], w[2 * a - 2], -w[2 * a - 1]);
        dft<R, 1>(x, y);
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) sink.take(j + a * m, y[a]);
    }
}
template <class Sink>
static TARGET void last(const Plan &plan, const complex *z, const Sink &sink) {
#define CALL(R) last_pass<R>(plan, z, sink)
    WITH_RADIX(plan.job->radix[0], CALL)
#undef CALL
}
template <int R>
INLINE void forward_pass(complex *z, int64_t m, const Real *w) {
    complex x[R], y[R];
    for (int64_t j = 0; j < m; j++, w += 2 * (R - 1)) {
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) x[a] = z[j + a * m];
        dft<R, -1>(x, y);
        z[j] = y[0];
#pragma GCC unroll 16
        for (int a = 1; a < R; a++) z[j + a * m] = times(y[a], w[2 * a - 2], w[2 * a - 1]);
    }
}
template <int R>
INLINE void inverse_pass(complex *z, int64_t m, const Real *w) {
    complex x[R], y[R];
    for (int64_t j = 0; j < m; j++, w += 2 * (R - 1)) {
        x[0] = z[j];
#pragma GCC unroll 16
        for (int a = 1; a < R; a++) x[a] = times(z[j + a * m], w[2 * a - 2], -w[2 * a - 1]);
        dft<R, 1>(x, y);
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) z[j + a * m] = y[a];
    }
}
template <int R, int sign>
INLINE void leaf_pass(const complex *z, complex *y) {  // whose twiddles are 1
    complex x[R];
#pragma GCC unroll 16
    for (int a = 0; a < R; a++) x[a] = z[a];
    dft<R, sign>(x, y);
}
template <class Step>
static TARGET void walk(const Plan &plan, int level, int64_t start, int64_t count, int64_t size, Step &step);

template <int R, class Step>
static TARGET void walk_by(const Plan &plan, int level, int64_t start, int64_t count, int64_t size, Step &step) {
    if (level == plan.job->passes - 1) {
        for (int64_t i = 0; i < count; i++) step.template leaf<R>(start + i * R);
        return;
    }
    int64_t block = size / count;
    for (int64_t i = 0; i < count; i++, start += block) {
        step.template down<R>(start, block / R, plan.twiddles[level]);
        walk(plan, level + 1, start, R, block, step);
        step.template up<R>(start, block / R, plan.twiddles[level]);
    }
}
// Takes ``count`` blocks from ``start`` on, of ``size`` in all, through the passes from ``level`` on and back.
template <class Step>
static TARGET void walk(const Plan &plan, int level, int64_t start, int64_t count, int64_t size, Step &step) {
#define CALL(R) walk_by<R>(plan, level, start, count, size, step)
    WITH_RADIX(plan.job->radix[level], CALL)
#undef CALL
}
// All passes but the first, which ``first`` and ``last`` do.
template <class Step>
static TARGET void walk(const Plan &plan, Step step) {
    walk(plan, 1, 0, plan.job->radix[0], plan.job->n, step);
}

// Down to the leaves and up again; a step that goes one way alone has nothing to do on the other.
struct Passes {
    complex *z;
    template <int R>
    TARGET void down(int64_t at, int64_t m, const Real *w) {
        forward_pass<R>(z + at, m, w);
    }
    template <int R>
    TARGET void up(int64_t at, int64_t m, const Real *w) {
        inverse_pass<R>(z + at, m, w);
    }
};
struct Forward : Passes {  // to a spectrum
    template <int R>
    TARGET void leaf(int64_t at) {
        complex y[R];
        leaf_pass<R, -1>(z + at, y);
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) z[at + a] = y[a];
    }
    template <int R>
    TARGET void up(int64_t, int64_t, const Real *) {}
};
struct Inverse : Passes {  // from a spectrum
    template <int R>
    TARGET void down(int64_t, int64_t, const Real *) {}
    template <int R>
    TARGET void leaf(int64_t at) {
        complex y[R];
        leaf_pass<R, 1>(z + at, y);
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) z[at + a] = y[a];
    }
};
struct Multiply : Passes {  // by the spectrum k
    const complex *k;
    // Lanes that are read and written after this, whose memory is asked for meanwhile.
    const Real *next;
    int64_t next_stride;
    Real *out;
    int64_t out_stride, pixels;

    template <int R>
    TARGET void leaf(int64_t at) {
        complex y[R];
        leaf_pass<R, -1>(z + at, y);
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) y[a] = product(y[a], k[at + a]);
        for (int64_t pixel = at; pixel < at + R && pixel < pixels; pixel++) {
            __builtin_prefetch(next + pixel * next_stride, 0, 2);
            __builtin_prefetch(out + pixel * out_stride, 1, 2);
        }
        leaf_pass<R, 1>(y, z + at);
    }
};
struct Correlate : Passes {  // the gradient z with the images' spectrum x, added to cross; then z by conj(k)
    const complex *x, *k;
    complex *cross;
    template <int R>
    TARGET void leaf(int64_t at) {
        complex y[R];
        leaf_pass<R, -1>(z + at, y);
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) {
            cross[at + a] = add(cross[at + a], conjugate_product(y[a], x[at + a]));
            y[a] = conjugate_product(y[a], k[at + a]);
        }
        leaf_pass<R, 1>(y, z + at);
    }
};
struct Power : Passes {  // of the sequences z times a scale, added to sum
    vec *sum;
    Real scale;
    template <int R>
    TARGET void leaf(int64_t at) {
        complex y[R];
        leaf_pass<R, -1>(z + at, y);
#pragma GCC unroll 16
        for (int a = 0; a < R; a++) {
            vec re = y[a].re * scale, im = y[a].im * scale;
            sum[at + a] += re * re + im * im;
        }
    }
    template <int R>
    TARGET void up(int64_t, int64_t, const Real *) {}
};
