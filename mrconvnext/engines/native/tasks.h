// The operations on images and kernels, a share of them for each thread. Included after transform.h.

// Where sequences come from and go to. Lags t >= 0 are real parts at t, lags t < 0 are minus imaginary parts at n + t.

struct Pixels {
    const int32_t *pixel_of;
    const Real *zeta, *lanes;
    int64_t stride;
    const Real *mean;
    TARGET complex at(int64_t t) const {
        int64_t pixel = pixel_of[t];
        vec u = load(pixel < 0 ? mean : lanes + pixel * stride) - load(mean);
        return {u * zeta[2 * t], u * zeta[2 * t + 1]};
    }
};
struct ToPixels {
    const int32_t *pixel_of;
    const Real *zeta;
    Real *lanes;
    int64_t stride;
    const Real *base;  // what is added: a bias, of stride 0, or what the pixels hold
    int64_t base_stride;
    TARGET void take(int64_t t, complex v) const {
        Real nowhere[LANES];
        int64_t pixel = pixel_of[t];
        vec u = v.re * zeta[2 * t] + v.im * zeta[2 * t + 1] + load(pixel < 0 ? base : base + pixel * base_stride);
        store(pixel < 0 ? nowhere : lanes + pixel * stride, u);
    }
};
struct Lags {
    const Real *zeta;
    const vec *middle;  // lag 0
    int64_t reach, n;
    Real scale;
    TARGET complex at(int64_t t) const {
        complex v = {t <= reach ? middle[t] : vec{}, t >= n - reach ? -middle[t - n] : vec{}};
        return times(v, zeta[2 * t] * scale, zeta[2 * t + 1] * scale);
    }
};
struct ToLags {
    const Real *zeta;
    vec *middle;
    int64_t reach, n;
    Real scale;
    TARGET void take(int64_t t, complex v) const {
        v = times(v, zeta[2 * t] * scale, -zeta[2 * t + 1] * scale);
        if (t <= reach) middle[t] = v.re;
        if (t >= n - reach) middle[t - n] = -v.im;
    }
};

// Between rows, one a channel, and lanes. Channels that a group has not are zeros.

// The lanes of a and b in turn: those of the first halves, or of the second.
INLINE vec interleave(vec a, vec b, int half) {
#if defined(__clang__)  // which makes one instruction of it
    vec both;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) both[i] = (i % 2 ? b : a)[i / 2 + half * LANES / 2];
    return both;
#else
    typedef Index indices __attribute__((vector_size(VECTOR_BYTES)));
    indices order;
    for (int i = 0; i < LANES; i++) order[i] = i / 2 + half * LANES / 2 + i % 2 * LANES;
    return __builtin_shuffle(a, b, order);
#endif
}
INLINE void transpose(vec *rows) {
    vec next[LANES];
#pragma GCC unroll 8
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) next[i] = interleave(rows[i / 2], rows[i / 2 + LANES / 2], i % 2);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}
static TARGET void pack(const Real *rows, int64_t row_size, int64_t channels, int64_t count, vec *lanes) {
    int64_t t = 0;
    for (; channels == LANES && t + LANES <= count; t += LANES) {
        vec tile[LANES];
#pragma GCC unroll 16
        for (int c = 0; c < LANES; c++) {
            tile[c] = load(rows + c * row_size + t);
            __builtin_prefetch(rows + c * row_size + t + 16 * LANES, 0, 3);
        }
        transpose(tile);
#pragma GCC unroll 16
        for (int c = 0; c < LANES; c++) lanes[t + c] = tile[c];
    }
    for (; t < count; t++) {
        lanes[t] = vec{};
        for (int64_t c = 0; c < channels; c++) lanes[t][c] = rows[c * row_size + t];
    }
}
static TARGET void unpack(const vec *lanes, int64_t channels, int64_t count, Real *rows, int64_t row_size) {
    int64_t t = 0;
    for (; channels == LANES && t + LANES <= count; t += LANES) {
        vec tile[LANES];
#pragma GCC unroll 16
        for (int c = 0; c < LANES; c++) tile[c] = lanes[t + c];
        transpose(tile);
#pragma GCC unroll 16
        for (int c = 0; c < LANES; c++) store(rows + c * row_size + t, tile[c]);
    }
    for (; t < count; t++)
        for (int64_t c = 0; c < channels; c++) rows[c * row_size + t] = lanes[t][c];
}
struct Values {  // one for each channel of a group, or zeros
    Real lanes[LANES] = {};
    TARGET Values(const void *values, int64_t start, int64_t channels) {
        for (int64_t c = 0; values && c < channels; c++) lanes[c] = ((const Real *)values)[start + c];
    }
};

// The channels that are lanes together.
struct Group {
    int64_t start, channels;
    TARGET Group(const Job *job, int64_t index) : start(index * LANES), channels(job->channels - start) {
        if (channels > LANES) channels = LANES;
    }
};
static int64_t groups(const Job *job) { return ceil_div(job->channels, LANES); }
static int64_t chunks(const Job *job) { return ceil_div(job->images, job->chunk); }
static int64_t end_of(const Job *job, int64_t chunk) { return smaller((chunk + 1) * job->chunk, job->images); }

// A group's lanes of images with ``all`` channels: those in memory where these are lanes there, or a copy.
struct Images {
    const Job *job;
    Real *data;
    int64_t all;

    TARGET Images(const Job *job, const void *data, int64_t all) : job(job), data((Real *)data), all(all) {}
    TARGET bool has_lanes(Group group) const { return job->channels_last && group.channels == LANES; }
    TARGET Real *first_of(int64_t image, int64_t channel) const {
        return data + image * job->pixels * all + channel * (job->channels_last ? 1 : job->pixels);
    }
    TARGET int64_t stride(Group group) const { return has_lanes(group) ? all : (int64_t)LANES; }
    TARGET Real *lanes(int64_t image, int64_t channel, Group group, vec *copy) const {
        return has_lanes(group) ? first_of(image, channel) : (Real *)copy;
    }
    TARGET void read(int64_t image, int64_t channel, Group group, vec *copy) const {
        const Real *from = first_of(image, channel);
        if (has_lanes(group)) return;
        if (!job->channels_last) return pack(from, job->pixels, group.channels, job->pixels, copy);
        for (int64_t p = 0; p < job->pixels; p++, from += all) {
            copy[p] = vec{};
            for (int64_t c = 0; c < group.channels; c++) copy[p][c] = from[c];
        }
    }
    TARGET void write(int64_t image, int64_t channel, Group group, const vec *copy) const {
        Real *to = first_of(image, channel);
        if (has_lanes(group)) return;
        if (!job->channels_last) return unpack(copy, group.channels, job->pixels, to, job->pixels);
        for (int64_t p = 0; p < job->pixels; p++, to += all)
            for (int64_t c = 0; c < group.channels; c++) to[c] = copy[p][c];
    }
};

// A thread's buffers: two copies of lanes, and spectra.
struct Buffers {
    vec *copy, *other_copy;
    complex *spectra;
    TARGET Buffers(const Job *job, const Share &share) {
        int64_t lanes = larger(larger(job->pixels, 2 * job->reach + 1), job->n);
        copy = (vec *)((char *)job->scratch + share.member * job->scratch_bytes);
        other_copy = copy + lanes;
        spectra = (complex *)(other_copy + lanes);
    }
};

static TARGET void image_spectrum(const Plan &plan, const Images &images, int64_t image, int64_t channel, Group group,
                                  const Real *mean, vec *copy, complex *z) {
    images.read(image, channel, group, copy);
    Real *lanes = images.lanes(image, channel, group, copy);
    const Job *job = plan.job;
    first(plan, Pixels{job->pixel_of, (const Real *)job->zeta, lanes, images.stride(group), mean}, z);
}
static TARGET void kernel_spectrum(const Plan &plan, int64_t row, Group group, vec *copy, complex *k) {
    const Job *job = plan.job;
    int64_t taps = 2 * job->reach + 1;
    pack((const Real *)job->kernel + row * taps, taps, group.channels, taps, copy);
    first(plan, Lags{(const Real *)job->zeta, copy + job->reach, job->reach, job->n, (Real)1 / (Real)job->n}, k);
    walk(plan, Forward{{k}});
}
static TARGET void lags_of(const Plan &plan, complex *z, vec *middle) {
    const Job *job = plan.job;
    walk(plan, Inverse{{z}});
    last(plan, z, ToLags{(const Real *)job->zeta, middle, job->reach, job->n, (Real)1 / (Real)job->n});
}

// What cpu.py asks for.

static TARGET void convolve(const Job *job) {
    Plan plan(job);
    Share share(job->threads, job->branches * groups(job) * job->images);
    Buffers buffers(job, share);
    complex *z = buffers.spectra, *k = z + job->n;
    Images x(job, job->x, job->channels), y(job, job->y, job->channels * job->branches);
    for (int64_t unit = share.from; unit < share.to; unit++) {
        int64_t image = unit % job->images, index = unit / job->images;
        Group group(job, index % groups(job));
        int64_t row = index / groups(job) * job->channels + group.start;
        if (unit == share.from || image == 0) kernel_spectrum(plan, row, group, buffers.copy, k);
        Values bias(job->bias, row, group.channels), none(nullptr, 0, 0);
        image_spectrum(plan, x, image, group.start, group, none.lanes, buffers.copy, z);
        Real *lanes = y.lanes(image, row, group, buffers.copy);
        const Real *next = x.lanes(image + 1 < job->images ? image + 1 : image, group.start, group, buffers.copy);
        walk(plan, Multiply{{z}, k, next, x.stride(group), lanes, y.stride(group), job->pixels});
        last(plan, z, ToPixels{job->pixel_of, (const Real *)job->zeta, lanes, y.stride(group), bias.lanes, 0});
        y.write(image, row, group, buffers.copy);
    }
}

// The gradients for the images, and of each chunk of them the spectra of those for the kernels.
static TARGET void gradients(const Job *job) {
    Plan plan(job);
    Share share(job->threads, groups(job) * chunks(job));
    Buffers buffers(job, share);
    complex *z = buffers.spectra, *x_spectrum = z + job->n, *k = x_spectrum + job->n;
    int64_t outputs = job->channels * job->branches;
    Images x(job, job->x, job->channels), grad(job, job->grad, outputs), y(job, job->y, job->channels);
    for (int64_t unit = share.from; unit < share.to; unit++) {
        int64_t chunk = unit % chunks(job), index = unit / chunks(job);
        Group group(job, index);
        complex *cross = (complex *)job->partial + chunk * job->branches * groups(job) * job->n + index * job->n;
        for (int64_t branch = 0; branch < job->branches; branch++) {
            kernel_spectrum(plan, branch * job->channels + group.start, group, buffers.copy, k + branch * job->n);
            for (int64_t f = 0; f < job->n; f++) cross[branch * groups(job) * job->n + f] = {vec{}, vec{}};
        }
        Values none(nullptr, 0, 0);
        for (int64_t image = chunk * job->chunk; image < end_of(job, chunk); image++) {
            image_spectrum(plan, x, image, group.start, group, none.lanes, buffers.copy, x_spectrum);
            walk(plan, Forward{{x_spectrum}});
            Real *lanes = y.lanes(image, group.start, group, buffers.other_copy);
            for (int64_t branch = 0; branch < job->branches; branch++) {
                int64_t row = branch * job->channels + group.start;
                image_spectrum(plan, grad, image, row, group, none.lanes, buffers.copy, z);
                walk(plan, Correlate{{z}, x_spectrum, k + branch * job->n, cross + branch * groups(job) * job->n});
                const Real *base = branch == 0 ? none.lanes : lanes;
                last(plan, z,
                     ToPixels{job->pixel_of, (const Real *)job->zeta, lanes, y.stride(group), base,
                              branch == 0 ? 0 : y.stride(group)});
            }
            y.write(image, group.start, group, buffers.other_copy);
        }
    }
}
static TARGET void kernel_gradients(const Job *job) {
    Plan plan(job);
    int64_t units = job->branches * groups(job);
    Share share(job->threads, units);
    Buffers buffers(job, share);
    complex *z = buffers.spectra;
    int64_t taps = 2 * job->reach + 1;
    for (int64_t unit = share.from; unit < share.to; unit++) {
        Group group(job, unit % groups(job));
        const complex *cross = (const complex *)job->partial + unit * job->n;
        for (int64_t f = 0; f < job->n; f++) {
            z[f] = {vec{}, vec{}};
            for (int64_t chunk = 0; chunk < chunks(job); chunk++) z[f] = add(z[f], cross[chunk * units * job->n + f]);
        }
        lags_of(plan, z, buffers.copy + job->reach);
        int64_t row = unit / groups(job) * job->channels + group.start;
        unpack(buffers.copy, group.channels, taps, (Real *)job->rows + row * taps, taps);
    }
}

// Sums of the images' power spectra less their mean, over n^2, (channels, n) in the order of the passes.
static TARGET void powers(const Job *job) {
    Plan plan(job);
    Share share(job->threads, groups(job) * chunks(job));
    Buffers buffers(job, share);
    Images x(job, job->x, job->channels);
    for (int64_t unit = share.from; unit < share.to; unit++) {
        int64_t chunk = unit % chunks(job), index = unit / chunks(job);
        Group group(job, index);
        vec *sum = (vec *)job->partial + (chunk * groups(job) + index) * job->n;
        for (int64_t f = 0; f < job->n; f++) sum[f] = vec{};
        Values mean(job->mean, group.start, group.channels);
        for (int64_t image = chunk * job->chunk; image < end_of(job, chunk); image++) {
            image_spectrum(plan, x, image, group.start, group, mean.lanes, buffers.copy, buffers.spectra);
            walk(plan, Power{{buffers.spectra}, sum, (Real)1 / (Real)job->n});
        }
    }
}
static TARGET void sums_of_powers(const Job *job) {
    Share share(job->threads, groups(job));
    Buffers buffers(job, share);
    for (int64_t index = share.from; index < share.to; index++) {
        Group group(job, index);
        const vec *power = (const vec *)job->partial + index * job->n;
        for (int64_t f = 0; f < job->n; f++) {
            buffers.copy[f] = vec{};
            for (int64_t chunk = 0; chunk < chunks(job); chunk++)
                buffers.copy[f] += power[chunk * groups(job) * job->n + f];
        }
        unpack(buffers.copy, group.channels, job->n, (Real *)job->rows + group.start * job->n, job->n);
    }
}
// The autocorrelations (channels, reach + 1) with the power spectra (channels, n) in ``kernel``.
static TARGET void correlations(const Job *job) {
    Plan plan(job);
    Share share(job->threads, groups(job));
    Buffers buffers(job, share);
    complex *z = buffers.spectra;
    int64_t lags = job->reach + 1;
    for (int64_t index = share.from; index < share.to; index++) {
        Group group(job, index);
        pack((const Real *)job->kernel + group.start * job->n, job->n, group.channels, job->n, buffers.copy);
        for (int64_t f = 0; f < job->n; f++) z[f] = {buffers.copy[f], vec{}};
        lags_of(plan, z, buffers.copy + job->reach);
        unpack(buffers.copy + job->reach, group.channels, lags, (Real *)job->rows + group.start * lags, lags);
    }
}
