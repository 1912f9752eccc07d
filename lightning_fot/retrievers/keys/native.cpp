// What a search does to many numbers, as one compiled library: plain C functions, called through ctypes (native.py).
//
// Everything here has a reference in torch or numpy beside it in this package, and gives the same answers. The code uses
// vectors of eight numbers, which the compiler lowers to what a machine has; functions marked are compiled
// several times, and the loader takes the best that the processor can run.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Flags __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef long long Longs __attribute__((vector_size(32), aligned(4), may_alias));

enum Kind { FLOAT32, BFLOAT16, FLOAT16, INT8 };

constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr int LANES = 8, TILE = 16, ROWS = 6;  // a tile: 6 queries by 16 keys, twelve vectors of sums
constexpr int BLOCK = 512;                     // keys packed at a time: 128 KB of 64 coordinates
constexpr int CHUNK = 1024, GROUP = 32;        // as in codes.py
constexpr int APART = CHUNK / GROUP;
constexpr int32_t LOWEST = -2147483647;

// Keys (n, dim) as they are stored: `scales` (half precision, one a row) multiply the products of INT8.
struct Keys {
    const char *data;
    int64_t stride;
    int64_t size;
    int32_t dim;
    int32_t kind;
    const uint16_t *scales;
    const uint8_t *gone;  // rows that do not count: those from `known` on do
    int64_t known;

    bool counts(int64_t row) const { return row >= known || !gone[row]; }
    const char *row(int64_t number) const {
        return data + number * stride * (kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2);
    }
};

INLINE Floats all(float value) { return Floats{value, value, value, value, value, value, value, value}; }

INLINE float half(uint16_t bits) {
    uint32_t magnitude = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    return sign ? -value : value;
}

INLINE Floats eight(const char *row, int at, int kind) {
    if (kind == FLOAT32) return *(const Floats *)(row + 4 * at);
    if (kind == INT8) return __builtin_convertvector(*(const Bytes *)(row + at), Floats);
    Words wide = __builtin_convertvector(*(const Halves *)(row + 2 * at), Words);
    if (kind == BFLOAT16) return (Floats)(wide << 16);
    return (Floats)(((Words)((Floats)((wide & 0x7fff) << 13) * 0x1p112f)) | ((wide & 0x8000) << 16));
}

INLINE float one(const char *row, int at, int kind) {
    if (kind == FLOAT32) return ((const float *)row)[at];
    if (kind == INT8) return ((const int8_t *)row)[at];
    uint16_t bits = ((const uint16_t *)row)[at];
    if (kind == FLOAT16) return half(bits);
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

INLINE float dot(const float *query, const char *row, int dim, int kind) {
    Floats first = {}, second = {};
    int at = 0;
    for (; at + 2 * LANES <= dim; at += 2 * LANES) {
        first += *(const Floats *)(query + at) * eight(row, at, kind);
        second += *(const Floats *)(query + at + LANES) * eight(row, at + LANES, kind);
    }
    for (; at + LANES <= dim; at += LANES) first += *(const Floats *)(query + at) * eight(row, at, kind);
    first += second;
    float sum = ((first[0] + first[4]) + (first[1] + first[5])) + ((first[2] + first[6]) + (first[3] + first[7]));
    for (; at < dim; at++) sum += query[at] * one(row, at, kind);
    return sum;
}

void dots(const float *query, const Keys &keys, int64_t first, int64_t last, float *scores) {
    int dim = keys.dim;
#define EACH(KIND) \
    for (int64_t row = first; row < last; row++) scores[row - first] = dot(query, keys.row(row), dim, KIND)
    if (keys.kind == FLOAT32) EACH(FLOAT32);
    else if (keys.kind == BFLOAT16) EACH(BFLOAT16);
    else if (keys.kind == FLOAT16) EACH(FLOAT16);
    else EACH(INT8);
#undef EACH
    if (keys.scales)
        for (int64_t row = first; row < last; row++) scores[row - first] *= half(keys.scales[row]);
}

float score(const float *query, const Keys &keys, int64_t row) {
    const char *place = keys.row(row);
    float sum = keys.kind == FLOAT32 ? dot(query, place, keys.dim, FLOAT32)
                : keys.kind == BFLOAT16 ? dot(query, place, keys.dim, BFLOAT16)
                : keys.kind == FLOAT16  ? dot(query, place, keys.dim, FLOAT16)
                                        : dot(query, place, keys.dim, INT8);
    return keys.scales ? sum * half(keys.scales[row]) : sum;
}

constexpr int SOON = 8;  // rows ahead of the one that is scored

INLINE void fetch(const Keys &keys, int64_t row) {
    const char *start = keys.row(row), *end = keys.row(row) + keys.dim * (keys.kind == FLOAT32 ? 4 : keys.kind == INT8 ? 1 : 2);
    for (; start < end; start += 64) __builtin_prefetch(start);
}

// The best k of what it is shown. A score that is no number counts as the lowest.
class Best {
  public:
    explicit Best(int k) : k_(k), room_(std::max(4 * k, 128)) { kept_.reserve(room_ + 1); }
    float least() const { return least_; }  // what a further score must be above, once there are k
    void show(float score, int64_t row) {
        if (score > least_ || (int)kept_.size() < k_) add(score, row);
    }
    void write(int64_t *rows, float *scores) {
        int count = std::min<int>(k_, kept_.size());
        if ((int)kept_.size() > count) std::nth_element(kept_.begin(), kept_.begin() + count, kept_.end(), better);
        std::sort(kept_.begin(), kept_.begin() + count, better);
        for (int at = 0; at < k_; at++) {
            rows[at] = at < count ? kept_[at].second : -1;
            if (scores) scores[at] = at < count ? kept_[at].first : NONE;
        }
    }
    void merge(const Best &other) {
        for (auto &entry : other.kept_) show(entry.first, entry.second);
    }
    // Rows are places in a list of rows from now on.
    void rename(const int64_t *rows) {
        for (auto &entry : kept_) entry.second = rows[entry.second];
    }

  private:
    typedef std::pair<float, int64_t> Entry;
    // Of equal scores the lower row, so that the order does not depend on who found them.
    static bool better(const Entry &a, const Entry &b) {
        return a.first > b.first || (a.first == b.first && a.second < b.second);
    }
    void add(float score, int64_t row) {
        kept_.emplace_back(score == score ? score : NONE, row);
        if ((int)kept_.size() < room_) return;
        std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), better);
        least_ = kept_[k_ - 1].first;
        kept_.resize(k_);
    }
    int k_, room_;
    float least_ = NONE;
    std::vector<Entry> kept_;
};

// ---- every key scored, for many queries: products that never leave the registers ----

void pack(const Keys &keys, int64_t first, int count, float *packed) {
    // 16 keys side by side for each coordinate; what is missing of the last 16 is zero.
    int dim = keys.dim;
    for (int tile = 0; tile < count; tile += TILE) {
        float *out = packed + (int64_t)tile * dim;
        for (int key = 0; key < TILE; key++) {
            if (tile + key >= count) {
                for (int at = 0; at < dim; at++) out[at * TILE + key] = 0;
                continue;
            }
            const char *row = keys.row(first + tile + key);
            int at = 0;
            for (; at + LANES <= dim; at += LANES) {
                Floats some = eight(row, at, keys.kind);
                for (int lane = 0; lane < LANES; lane++) out[(at + lane) * TILE + key] = some[lane];
            }
            for (; at < dim; at++) out[at * TILE + key] = one(row, at, keys.kind);
        }
    }
}

template <int COUNT>
INLINE void tiles(const float *queries, const Keys &keys, int64_t first, int count, const float *packed, Best *best) {
    int dim = keys.dim;
    for (int tile = 0; tile < count; tile += TILE) {
        const float *side = packed + (int64_t)tile * dim;
        Floats left[COUNT], right[COUNT];
        for (int q = 0; q < COUNT; q++) left[q] = right[q] = Floats{};
        for (int at = 0; at < dim; at++) {
            Floats low = *(const Floats *)(side + at * TILE), high = *(const Floats *)(side + at * TILE + LANES);
#pragma GCC unroll 6
            for (int q = 0; q < COUNT; q++) {
                Floats factor = all(queries[q * dim + at]);
                left[q] += factor * low;
                right[q] += factor * high;
            }
        }
        float scale[TILE];
        int width = std::min(TILE, count - tile);
        if (keys.scales) {
            for (int key = 0; key < TILE; key++) scale[key] = key < width ? half(keys.scales[first + tile + key]) : 0;
            for (int q = 0; q < COUNT; q++) left[q] *= *(Floats *)scale, right[q] *= *(Floats *)(scale + LANES);
        }
        Flags any = {};
        for (int q = 0; q < COUNT; q++) {
            // Not "above": what is no number must be looked at too, while there are fewer than k.
            Floats least = all(best[q].least());
            any |= ~((Flags)(left[q] <= least) & (Flags)(right[q] <= least));
        }
        Longs some = (Longs)any;
        if (!(some[0] | some[1] | some[2] | some[3]) && best[0].least() > NONE) continue;
        for (int q = 0; q < COUNT; q++) {
            float scores[TILE];
            *(Floats *)scores = left[q], *(Floats *)(scores + LANES) = right[q];
            for (int key = 0; key < width; key++)
                if (!(scores[key] <= best[q].least()) || best[q].least() == NONE)
                    if (keys.counts(first + tile + key)) best[q].show(scores[key], first + tile + key);
        }
    }
}

void many(const float *queries, int count, const Keys &keys, int64_t first, int64_t last, Best *best) {
    std::vector<float> packed((int64_t)BLOCK * keys.dim);
    for (int64_t start = first; start < last; start += BLOCK) {
        int width = (int)std::min<int64_t>(BLOCK, last - start);
        pack(keys, start, width, packed.data());
        int q = 0;
        for (; q + ROWS <= count; q += ROWS)
            tiles<ROWS>(queries + (int64_t)q * keys.dim, keys, start, width, packed.data(), best + q);
        for (; q + 2 <= count; q += 2)
            tiles<2>(queries + (int64_t)q * keys.dim, keys, start, width, packed.data(), best + q);
        for (; q < count; q++) tiles<1>(queries + (int64_t)q * keys.dim, keys, start, width, packed.data(), best + q);
    }
}

void few(const float *queries, int count, const Keys &keys, int64_t first, int64_t last, Best *best) {
    float scores[BLOCK];
    for (int64_t start = first; start < last; start += BLOCK) {
        int64_t end = std::min<int64_t>(last, start + BLOCK);
        for (int q = 0; q < count; q++) {
            dots(queries + (int64_t)q * keys.dim, keys, start, end, scores);
            for (int64_t row = start; row < end; row++)
                if (keys.counts(row)) best[q].show(scores[row - start], row);
        }
    }
}

constexpr int AT_ONCE = 1024;  // queries whose best are held at a time: a few MB
constexpr int FEW = 4;  // queries for which packing does not pay

void scan(const float *queries, int count, const Keys &keys, int64_t first, int64_t last, Best *best) {
    (count < FEW ? few : many)(queries, count, keys, first, last, best);
}

// The part of `total` that is thread `number`'s of `threads`, in whole units.
std::pair<int64_t, int64_t> share(int64_t total, int64_t unit, int number, int threads) {
    int64_t units = (total + unit - 1) / unit;
    return {std::min(total, units * number / threads * unit), std::min(total, units * (number + 1) / threads * unit)};
}

template <typename Work> void parallel(int threads, Work work) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(0, 1);
}

void scan_parallel(const float *queries, int count, const Keys &keys, std::vector<Best> &best, int k, int threads) {
    if ((int64_t)count * keys.size * keys.dim < (1 << 20)) threads = 1;  // a call is shorter than waking a thread
    if (count >= 4 * ROWS * threads) {
        parallel(threads, [&](int number, int all) {
            auto part = share(count, ROWS, number, all);
            if (part.first < part.second)
                scan(queries + part.first * keys.dim, (int)(part.second - part.first), keys, 0, keys.size, &best[part.first]);
        });
        return;
    }
    std::vector<std::vector<Best>> each(std::max(1, threads));
    parallel(threads, [&](int number, int all) {
        auto part = share(keys.size, BLOCK, number, all);
        each[number].assign(count, Best(k));
        scan(queries, count, keys, part.first, part.second, each[number].data());
    });
    for (auto &one : each)
        for (size_t q = 0; q < one.size(); q++) best[q].merge(one[q]);
}

// ---- eight bits with bounds, for few queries ----

INLINE int32_t product(const int8_t *query, const int8_t *code, int dim) {
    int32_t sum = 0;
    for (int at = 0; at < dim; at++) sum += (int32_t)query[at] * code[at];
    return sum;
}

#if defined(__AVX2__)
constexpr int AHEAD = 8192;  // bytes that are asked for before they are needed

// Codes are at most 127 in size: two products add up to 32,258, which 16 bits hold.
INLINE __m256i part(__m256i query, __m256i size, __m256i code) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(code, query)), _mm256_set1_epi16(1));
}

// Products (CHUNK,) of a query's code with those of a chunk.
void multiply(const int8_t *query, const int8_t *codes, int dim, int32_t *out) {
    int whole = dim / 32 * 32, sixteen = dim / 16 * 16;
    for (int row = 0; row < CHUNK; row += 8) {
        __m256i sums[8];
        for (int each = 0; each < 8; each++) sums[each] = _mm256_setzero_si256();
        const int8_t *start = codes + (int64_t)row * dim;
        for (int line = 0; line < 8 * dim; line += 64) _mm_prefetch((const char *)(start + AHEAD + line), _MM_HINT_T0);
        for (int at = 0; at < whole; at += 32) {
            __m256i asked = _mm256_loadu_si256((const __m256i *)(query + at)), size = _mm256_abs_epi8(asked);
#pragma GCC unroll 8
            for (int each = 0; each < 8; each++) {
                __m256i code = _mm256_loadu_si256((const __m256i *)(start + each * dim + at));
                sums[each] = _mm256_add_epi32(sums[each], part(asked, size, code));
            }
        }
        if (sixteen > whole) {
            __m256i asked = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(query + whole)));
            __m256i size = _mm256_abs_epi8(asked);
#pragma GCC unroll 8
            for (int each = 0; each < 8; each++) {
                __m128i code = _mm_loadu_si128((const __m128i *)(start + each * dim + whole));
                sums[each] = _mm256_add_epi32(sums[each], part(asked, size, _mm256_zextsi128_si256(code)));
            }
        }
        __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
        __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[4], sums[5]), _mm256_hadd_epi32(sums[6], sums[7]));
        __m256i total = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
        _mm256_storeu_si256((__m256i *)(out + row), total);
        if (sixteen < dim)
            for (int each = 0; each < 8; each++)
                out[row + each] += product(query + sixteen, start + each * dim + sixteen, dim - sixteen);
    }
}
#else
void multiply(const int8_t *query, const int8_t *codes, int dim, int32_t *out) {
    for (int row = 0; row < CHUNK; row++) out[row] = product(query, codes + (int64_t)row * dim, dim);
}
#endif

constexpr int64_t WORTH_A_THREAD = 32 << 20;  // bytes of codes

struct Coded {
    const int8_t *codes;
    const float *scales, *lost, *norms;
    int64_t size;
    const float *rotation;  // (dim, dim)
};

// A query as codes are multiplied with (CodedQueries in codes.py): divided by a power of two where it is of no usual
// size, turned, and in steps of which the largest coordinate has 127.
struct CodedQuery {
    std::vector<float> unit;
    std::vector<int8_t> code;
    float size = 1, norms[2];

    CodedQuery(const float *query, const float *rotation, int dim) : unit(query, query + dim), code(dim) {
        std::vector<float> turned(dim);
        float top = turn(rotation, turned);
        if (!(1e-6f < top && top < 1e6f)) {
            float widest = 0;
            for (float number : unit) widest = std::max(widest, std::fabs(number));
            int power = -100;
            if (widest > 0x1p-100f) std::frexp(widest, &power), power -= 1;
            size = std::ldexp(1.0f, power);
            for (float &number : unit) number /= size;
            top = std::max(turn(rotation, turned), 1e-30f);
        }
        float whole = 0, left = 0;
        for (int at = 0; at < dim; at++) {
            float steps = turned[at] * (127 / top), rounded = std::nearbyint(steps);
            code[at] = (int8_t)rounded;
            whole += steps * steps;
            left += (steps - rounded) * (steps - rounded);
        }
        norms[0] = std::max(std::sqrt(whole), 1e-30f), norms[1] = std::max(std::sqrt(left), 1e-30f);
    }

  private:
    float turn(const float *rotation, std::vector<float> &turned) {
        int dim = (int)unit.size();
        std::fill(turned.begin(), turned.end(), 0.0f);
        for (int from = 0; from < dim; from++)
            for (int at = 0; at < dim; at++) turned[at] += unit[from] * rotation[(int64_t)from * dim + at];
        float top = 0;
        for (float number : turned) top = std::max(top, std::fabs(number));
        return top;
    }
};

// Rows whose upper bound reaches the k-th largest lower bound of a group: each of these groups holds a key above it.
class Reaching {
  public:
    Reaching(int k, int64_t most) : k_(k), most_(most) {}
    bool hopeless = false;  // so many rows are alike that a scan of all is faster

    static void tops(const int32_t *products, int32_t *top) {
        for (int group = 0; group < APART; group++) top[group] = products[group];
        for (int row = 1; row < GROUP; row++)
            for (int group = 0; group < APART; group++) top[group] = std::max(top[group], products[row * APART + group]);
    }

    void take(const int32_t *products, const Coded &coded, int64_t first, const float *norms) {
        int32_t top[APART];
        float slack[APART], high[APART];
        tops(products, top);
        int64_t number = first / GROUP;
        // All lower bounds first: rows of the first chunk are then measured by the best of it.
        for (int group = 0; group < APART; group++, number++) {
            slack[group] = norms[0] * coded.lost[number] + norms[1] * coded.norms[number];
            float middle = (float)top[group] * coded.scales[number];
            high[group] = top[group] == LOWEST ? NONE : middle + slack[group];
            if (high[group] >= least_ && top[group] != LOWEST) keep_low(middle - slack[group]);
        }
        number = first / GROUP;
        for (int group = 0; group < APART; group++, number++) {
            if (top[group] == LOWEST || high[group] < least_) continue;
            for (int row = 0; row < GROUP; row++) {
                int32_t found = products[row * APART + group];
                float bound = (float)found * coded.scales[number] + slack[group];
                if (found != LOWEST && bound >= least_) rows_.emplace_back(bound, first + row * APART + group);
            }
        }
        if ((int64_t)rows_.size() > 2 * most_) drop();
    }

    void merge(const Reaching &other) {
        for (float low : other.lows_) keep_low(low);
        rows_.insert(rows_.end(), other.rows_.begin(), other.rows_.end());
        hopeless |= other.hopeless;
    }

    // What is left, once all was taken: with fewer than k groups everything is.
    const std::vector<std::pair<float, int64_t>> &left() {
        drop();
        return rows_;
    }

  private:
    void keep_low(float low) {
        if ((int)lows_.size() < k_) {
            lows_.push_back(low);
            std::push_heap(lows_.begin(), lows_.end(), std::greater<float>());
        } else if (low > lows_.front()) {
            std::pop_heap(lows_.begin(), lows_.end(), std::greater<float>());
            lows_.back() = low;
            std::push_heap(lows_.begin(), lows_.end(), std::greater<float>());
        }
        if ((int)lows_.size() == k_) least_ = lows_.front();
    }
    void drop() {
        float least = least_;
        rows_.erase(std::remove_if(rows_.begin(), rows_.end(), [least](const std::pair<float, int64_t> &row) { return row.first < least; }), rows_.end());
        hopeless |= (int64_t)rows_.size() > most_;
    }
    int k_;
    int64_t most_;
    float least_ = NONE;
    std::vector<float> lows_;
    std::vector<std::pair<float, int64_t>> rows_;
};

}  // namespace

#ifndef DIGEST
#define DIGEST "unknown"
#endif

// Of which source this was made.
PUBLIC const char *fot_digest() { return DIGEST; }

// Threads that a call may use at most.
PUBLIC int32_t fot_threaded() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// What numbers (count) are: 0, usual, or all zero in a row of `dim`; 1, some row is very large or small; 2, not finite.
PUBLIC int32_t fot_sizes(const float *numbers, int64_t count, int32_t dim, float usual) {
    int32_t found = 0;
    for (int64_t row = 0; row < count; row++) {
        float top = 0, none = 0;
        for (int at = 0; at < dim; at++) {
            float size = std::fabs(numbers[row * dim + at]);
            top = size > top ? size : top;
            none += size * 0;  // NaN, if this is infinite or no number
        }
        if (none != none) return 2;
        if (top > usual || (top < 1 / usual && top != 0)) found = 1;
    }
    return found;
}

struct Asked {
    const float *queries;  // (count, dim)
    int32_t count;
    int32_t k;
    int32_t threads;
};

struct Found {
    int64_t *rows;  // (count, k), -1 where there are fewer
    float *scores;  // (count, k), best first; or null
};

// The k best keys of each query by inner product, every key scored.
PUBLIC void fot_scan(const Asked *asked, const Keys *keys, const Found *found) {
    int64_t k = asked->k;
    for (int64_t start = 0; start < asked->count; start += AT_ONCE) {
        int count = (int)std::min<int64_t>(AT_ONCE, asked->count - start);
        std::vector<Best> best(count, Best(asked->k));
        scan_parallel(asked->queries + start * keys->dim, count, *keys, best, asked->k, asked->threads);
        for (int q = 0; q < count; q++) best[q].write(found->rows + (start + q) * k, found->scores + (start + q) * k);
    }
}

// As fot_scan, by codes of the first keys; those behind them are all scored. A query whose `answered` stays 0 is to be
// scanned. At most `most` keys are scored exactly.
PUBLIC void fot_scan_coded(const Asked *asked, const Coded *coded, const Keys *keys, int64_t most, const Found *found,
                           uint8_t *answered) {
    int32_t count = asked->count, k = asked->k, dim = keys->dim;
    // What is smaller than the caches of a processor is read sooner than a second thread wakes.
    int threads = coded->size * dim < WORTH_A_THREAD ? 1 : std::max(1, asked->threads);
    std::vector<CodedQuery> queries;
    for (int32_t q = 0; q < count; q++) queries.emplace_back(asked->queries + (int64_t)q * dim, coded->rotation, dim);
    std::vector<std::vector<Reaching>> each(threads);
    parallel(threads, [&](int number, int all) {
        int32_t room[CHUNK];
        auto part = share(coded->size, CHUNK, number, all);
        auto &own = each[number];
        own.assign(count, Reaching(k, most));
        for (int64_t first = part.first; first < part.second; first += CHUNK)
            for (int32_t q = 0; q < count; q++) {
                if (own[q].hopeless) continue;
                multiply(queries[q].code.data(), coded->codes + first * dim, dim, room);
                for (int64_t row = first; row < std::min(first + CHUNK, keys->known); row++)
                    if (keys->gone[row]) room[row - first] = LOWEST;
                own[q].take(room, *coded, first, queries[q].norms);
            }
    });
    for (int32_t q = 0; q < count; q++) {
        Reaching &all = each[0][q];
        for (int other = 1; other < threads; other++)
            if (!each[other].empty()) all.merge(each[other][q]);
        auto &left = all.left();
        answered[q] = !all.hopeless;
        if (all.hopeless) continue;
        const float *unit = queries[q].unit.data();
        Best best(k);
        for (size_t at = 0; at < left.size(); at++) {
            if (at + SOON < left.size()) fetch(*keys, left[at + SOON].second);
            best.show(score(unit, *keys, left[at].second), left[at].second);
        }
        scan(unit, 1, *keys, coded->size, keys->size, &best);
        best.write(found->rows + (int64_t)q * k, found->scores + (int64_t)q * k);
        for (int32_t at = 0; at < k; at++) found->scores[(int64_t)q * k + at] *= queries[q].size;
    }
}

// What an index answered, merged with rows set apart and with rows found otherwise, by exact scores.
struct Answer {
    const int64_t *rows;  // (count, width), -1 where there is none
    int32_t width;
    int32_t others_width;
    int64_t limit;          // rows must be below
    const uint8_t *hidden;  // (limit,), 1 for rows set apart; or null
    const int64_t *apart;   // the same rows; those of `apart_keys`
    const int64_t *others;  // (count, others_width) rows found otherwise, -1 where there is none
    const float *other_scores;
};

// Returns 0; 1 where a row is out of range, 2 where one comes twice.
PUBLIC int32_t fot_merge(const Asked *asked, const Answer *answer, const Keys *keys, const Keys *apart_keys,
                         const Found *found) {
    int32_t count = asked->count, k = asked->k, width = answer->width;
    std::vector<Best> best(count, Best(k));
    std::vector<int32_t> wrong(std::max(1, asked->threads), 0);
    int threads = (int64_t)count * width < 4096 ? 1 : std::max(1, asked->threads);
    if (apart_keys->size) {
        scan_parallel(asked->queries, count, *apart_keys, best, k, asked->threads);
        for (auto &one : best) one.rename(answer->apart);
    }
    parallel(threads, [&](int number, int all) {
        auto part = share(count, 1, number, all);
        std::vector<int64_t> sorted(width);
        for (int64_t q = part.first; q < part.second; q++) {
            const int64_t *rows = answer->rows + q * width;
            sorted.assign(rows, rows + width);
            std::sort(sorted.begin(), sorted.end());
            if (sorted.front() < -1 || sorted.back() >= answer->limit) wrong[number] = 1;
            for (int32_t at = 1; at < width; at++)
                if (sorted[at] == sorted[at - 1] && sorted[at] >= 0 && !wrong[number]) wrong[number] = 2;
            if (wrong[number]) return;
            const float *query = asked->queries + q * keys->dim;
            for (int32_t at = 0; at < width; at++) {
                if (at + SOON < width && rows[at + SOON] >= 0) fetch(*keys, rows[at + SOON]);
                int64_t row = rows[at];
                if (row >= 0 && !(answer->hidden && answer->hidden[row])) best[q].show(score(query, *keys, row), row);
            }
            for (int32_t at = 0; at < answer->others_width; at++) {
                int64_t row = answer->others[q * answer->others_width + at];
                if (row >= 0) best[q].show(answer->other_scores[q * answer->others_width + at], row);
            }
            best[q].write(found->rows + q * k, nullptr);
        }
    });
    int32_t worst = 0;
    for (int32_t one : wrong) worst = worst ? worst : one;
    return worst;
}
