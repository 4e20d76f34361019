// y = x W^T + b for packed W on AVX-512: expand the kept values of a row under its bitmask, multiply, sum in fp32.
//
// Layouts: see formats.py.  Dims: M batch rows, N outputs, S stored columns; one block = 64 columns of one row.
// Small batches: a thread owns a range of rows of W and streams each once; the row meets all batch rows while in L1.
// Larger batches: W is expanded panel by panel of rows, each small enough for a cache, and torch multiplies by it.
// A 16-bit float kept value is moved to its column by vpexpandw in its register form (the memory form is slow on some
// processors); bfloat16 products are vdpbf16ps, which takes denormals for zero.  int8 and int4 levels become bfloat16
// (exactly) or float32 in registers; scales are applied to float32 sums.
//
// SECATEUR_NAMESPACE: the torch library of the raw kernels.  secateur::* is registered by activate(), after a
// self-test; by secateur_register_standalone(), schemas included, in a process without Python.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <immintrin.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <memory>
#include <optional>

#ifndef SECATEUR_NAMESPACE
#define SECATEUR_NAMESPACE secateur_cpu
#endif
#define LIBRARY(name, handle) TORCH_LIBRARY(name, handle)

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t BLOCK = 64;           // columns
constexpr int64_t SCALE_COLUMNS = 128;  // columns that share an int4 scale
constexpr int64_t PANEL = 1 << 20;       // elements of a dense panel
constexpr int64_t TILE = 4;             // batch rows that meet a row of W in one pass over it
constexpr int64_t AHEAD = 4096;         // bytes of values to prefetch ahead
constexpr int64_t GRAIN = 1 << 17;      // weights a thread must have to be worth waking

// ---- bfloat16 arithmetic, with and without AVX512_BF16

#if defined(__AVX512BF16__)
inline __m512 dot_bf16(__m512 acc, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
}
inline __m512i round_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else
inline __m512 dot_bf16(__m512 acc, __m512i w, __m512i x) {
  const __m512i odd = _mm512_set1_epi32(0xFFFF0000);
  acc = _mm512_fmadd_ps(
      _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), acc);
  return _mm512_fmadd_ps(
      _mm512_castsi512_ps(_mm512_and_si512(w, odd)), _mm512_castsi512_ps(_mm512_and_si512(x, odd)), acc);
}
inline __m256i round_half(__m512 v) {  // to nearest, ties to even
  __m512i bits = _mm512_castps_si512(v);
  __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
inline __m512i round_bf16(__m512 low, __m512 high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(round_half(low)), round_half(high), 1);
}
#endif

inline __m256i half(__m512i v, int which) {
  return which ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
}
inline __m512i wide(__m256i v) { return _mm512_castsi256_si512(v); }
inline __m512 float_of_bf16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// ---- what a block of 64 dense columns is in registers, by the type that x is read in

struct Bf16 {
  using Scalar = uint16_t;
  static constexpr at::ScalarType type = at::kBFloat16;
  __m512i part[2];
  template <int CHAINS, int FIRST = 0>
  inline void dot(__m512* acc, const Scalar* x) const {
    for (int i = 0; i < 2; ++i)
      acc[(FIRST + i) % CHAINS] = dot_bf16(acc[(FIRST + i) % CHAINS], part[i], _mm512_loadu_si512(x + 32 * i));
  }
  inline void to_floats(__m512* out) const {
    for (int i = 0; i < 4; ++i) out[i] = float_of_bf16(half(part[i / 2], i % 2));
  }
};

struct Fp32 {
  using Scalar = float;
  static constexpr at::ScalarType type = at::kFloat;
  __m512 part[4];
  template <int CHAINS, int FIRST = 0>
  inline void dot(__m512* acc, const Scalar* x) const {
    for (int i = 0; i < 4; ++i)
      acc[(FIRST + i) % CHAINS] = _mm512_fmadd_ps(part[i], _mm512_loadu_ps(x + 16 * i), acc[(FIRST + i) % CHAINS]);
  }
  inline void to_floats(__m512* out) const {
    for (int i = 0; i < 4; ++i) out[i] = part[i];
  }
};

// Kept values of a block, in order, moved to their columns.  The zeros to merge into are hidden from the compiler: the
// zero-masking form of vpexpand waits for the old value of its destination on Zen 5, which makes the loop 3.5 x slower.
inline __m512i zeros() {
  __m512i zero = _mm512_setzero_si512();
  asm("" : "+v"(zero));
  return zero;
}
template <class R>
inline Bf16 expand_bf16(__m256i low, __m256i high, const R& row, int64_t block) {
  return {{_mm512_mask_expand_epi16(zeros(), row.template kept<uint32_t>(block, 0), wide(low)),
           _mm512_mask_expand_epi16(zeros(), row.template kept<uint32_t>(block, 1), wide(high))}};
}
template <class R>
inline __m512 expand_f32(__m256 kept, const R& row, int64_t block, int part) {
  return _mm512_mask_expand_ps(_mm512_castsi512_ps(zeros()), row.template kept<uint16_t>(block, part),
                               _mm512_castps256_ps512(kept));
}

// ---- levels to bfloat16, exactly

inline __m512i bf16_of_int8(const uint8_t* levels) {  // 32 bytes
  const __m512i bytes[2] = {
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels))),
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + 16)))};
  return round_bf16(_mm512_cvtepi32_ps(bytes[0]), _mm512_cvtepi32_ps(bytes[1]));
}

alignas(64) constexpr uint16_t LEVEL_BF16[32] = {  // -8 .. 7, twice: the look-up reads five bits, a level has four
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
    0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040,
    0x4080, 0x40A0, 0x40C0, 0x40E0};

inline __m512i bf16_of_int4(const uint8_t* packed) {  // 16 bytes, 32 levels
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i index = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));  // 16-bit lanes: byte, byte >> 4
  return _mm512_permutexvar_epi16(index, _mm512_load_si512(LEVEL_BF16));
}

// ---- readers: row n of a packed weight, block by block; bits of one stored element

template <bool sparse, int bits>
struct Row {
  static constexpr bool grouped = bits == 4;
  static constexpr int64_t MAX_STREAMED_BATCH = 2 * bits;  // measured: the more work a value is, the sooner panels pay
  static constexpr int64_t bytes_of(int64_t columns) { return columns * bits / (sparse ? 16 : 8); }
  static constexpr int64_t BYTES = bytes_of(BLOCK);
  const uint8_t* values;
  const uint8_t* mask;

  Row(const void* v, const void* m, int64_t n, int64_t stored)
      : values(static_cast<const uint8_t*>(v) + n * bytes_of(stored)),
        mask(sparse ? static_cast<const uint8_t*>(m) + n * (stored / 8) : nullptr) {}

  inline const uint8_t* at(int64_t block) const {
    const uint8_t* here = values + block * BYTES;
    _mm_prefetch(reinterpret_cast<const char*>(here + AHEAD), _MM_HINT_T0);
    return here;
  }
  template <class Word>
  inline Word kept(int64_t block, int part) const {
    Word word;
    std::memcpy(&word, mask + block * 8 + part * sizeof(Word), sizeof(Word));
    return word;
  }
};

inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

struct SparseBf16 : Row<true, 16> {
  using Row::Row;
  inline void block(int64_t i, Bf16& w) const {
    const uint8_t* v = at(i);
    w = expand_bf16(load32(v), load32(v + 32), *this, i);
  }
};
struct DenseBf16 : Row<false, 16> {
  using Row::Row;
  inline void block(int64_t i, Bf16& w) const {
    const uint8_t* v = at(i);
    _mm_prefetch(reinterpret_cast<const char*>(v + 64 + AHEAD), _MM_HINT_T0);
    w = {{_mm512_loadu_si512(v), _mm512_loadu_si512(v + 64)}};
  }
};
struct SparseF16 : Row<true, 16> {
  using Row::Row;
  inline void block(int64_t i, Fp32& w) const {
    const uint8_t* v = at(i);
    for (int j = 0; j < 4; ++j)
      w.part[j] =
          expand_f32(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v + 16 * j))), *this, i, j);
  }
};
struct SparseF32 : Row<true, 32> {
  using Row::Row;
  inline void block(int64_t i, Fp32& w) const {
    const uint8_t* v = at(i);
    _mm_prefetch(reinterpret_cast<const char*>(v + 64 + AHEAD), _MM_HINT_T0);
    for (int j = 0; j < 4; ++j) w.part[j] = expand_f32(_mm256_castsi256_ps(load32(v + 32 * j)), *this, i, j);
  }
};
struct DenseF32 : Row<false, 32> {
  using Row::Row;
  inline void block(int64_t i, Fp32& w) const {
    const uint8_t* v = at(i);
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(v + 64 * j + AHEAD), _MM_HINT_T0);
      w.part[j] = _mm512_loadu_ps(v + 64 * j);
    }
  }
};
struct SparseI8 : Row<true, 8> {
  using Row::Row;
  inline void block(int64_t i, Bf16& w) const {
    const __m512i levels = bf16_of_int8(at(i));
    w = expand_bf16(half(levels, 0), half(levels, 1), *this, i);
  }
  inline void block(int64_t i, Fp32& w) const {
    const uint8_t* v = at(i);
    for (int j = 0; j < 4; ++j) {
      const __m256i four = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v + 8 * j)));
      w.part[j] = expand_f32(_mm256_cvtepi32_ps(four), *this, i, j);
    }
  }
};
struct DenseI8 : Row<false, 8> {
  using Row::Row;
  inline void block(int64_t i, Bf16& w) const {
    const uint8_t* v = at(i);
    w = {{bf16_of_int8(v), bf16_of_int8(v + 32)}};
  }
  inline void block(int64_t i, Fp32& w) const {
    const uint8_t* v = at(i);
    for (int j = 0; j < 4; ++j)
      w.part[j] = _mm512_cvtepi32_ps(
          _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v + 16 * j))));
  }
};
struct SparseI4 : Row<true, 4> {
  using Row::Row;
  inline void block(int64_t i, Bf16& w) const {
    const __m512i levels = bf16_of_int4(at(i));
    w = expand_bf16(half(levels, 0), half(levels, 1), *this, i);
  }
  inline void block(int64_t i, Fp32& w) const {
    Bf16 narrow;
    block(i, narrow);
    narrow.to_floats(w.part);
  }
};
struct DenseI4 : Row<false, 4> {
  using Row::Row;
  inline void block(int64_t i, Bf16& w) const {
    const uint8_t* v = at(i);
    w = {{bf16_of_int4(v), bf16_of_int4(v + 16)}};
  }
  inline void block(int64_t i, Fp32& w) const {
    Bf16 narrow;
    block(i, narrow);
    narrow.to_floats(w.part);
  }
};

// The last, short block of a row, copied where whole blocks can be read; its missing columns meet zeros of x.
template <class R>
struct Tail {
  alignas(64) uint8_t values[R::BYTES] = {};
  alignas(64) uint8_t mask[8] = {};
  R row;
  Tail(const R& from, int64_t stored) : row(values, mask, 0, 0) {
    const int64_t block = stored / BLOCK, columns = stored % BLOCK;
    std::memcpy(values, from.values + block * R::BYTES, R::bytes_of(columns));
    if (from.mask) std::memcpy(mask, from.mask + block * 8, columns / 8);
  }
};

struct Operands {
  const void* values;
  const void* mask;
  const void* scale;  // float32 [N] or bfloat16 [N, G]
  int64_t rows, stored, groups;
  float group_scale(int64_t n, int64_t g) const {
    return static_cast<float>(static_cast<const at::BFloat16*>(scale)[n * groups + g]);
  }
  float row_scale(int64_t n) const { return scale ? static_cast<const float*>(scale)[n] : 1.0f; }
};

// ---- ROWS rows of W with B batch rows.  x of B batch rows lies as [block][B][64 columns], padded with zeros.

template <class R, class X, int ROWS, int B, int CHAINS>
struct Sums {
  __m512 acc[ROWS][B][CHAINS];
  inline Sums() {
    for (auto& row : acc)
      for (auto& batch : row)
        for (auto& v : batch) v = _mm512_setzero_ps();
  }
  template <int FIRST = 0>
  inline void block(const R* rows, int64_t i, const typename X::Scalar* x) {
    for (int r = 0; r < ROWS; ++r) {
      X w;
      rows[r].block(i, w);
      for (int b = 0; b < B; ++b) w.template dot<CHAINS, FIRST>(acc[r][b], x + b * BLOCK);
    }
  }
  inline void tail(const R* rows, int64_t stored, const typename X::Scalar* x) {
    for (int r = 0; r < ROWS; ++r) {
      const Tail<R> last(rows[r], stored);
      X w;
      last.row.block(0, w);
      for (int b = 0; b < B; ++b) w.template dot<CHAINS>(acc[r][b], x + b * BLOCK);
    }
  }
  inline __m512 sum(int r, int b) const {
    __m512 total = acc[r][b][0];
    for (int c = 1; c < CHAINS; ++c) total = _mm512_add_ps(total, acc[r][b][c]);
    return total;
  }
};

// Writes the sums of rows first .. first + ROWS - 1 (those past last repeat it) to out[r * B + b].
template <class R, class X, int ROWS, int B>
inline void tile(const Operands& w, int64_t first, int64_t last, const typename X::Scalar* x, float* out) {
  const auto readers = [&]<size_t... r>(std::index_sequence<r...>) {
    return std::array<R, ROWS>{R(w.values, w.mask, std::min<int64_t>(first + r, last), w.stored)...};
  }(std::make_index_sequence<ROWS>());
  const R* rows = readers.data();
  const int64_t blocks = w.stored / BLOCK;
  constexpr int64_t STEP = B * BLOCK;
  if constexpr (!R::grouped) {
    constexpr int CHAINS = ROWS * B == 1 ? 4 : ROWS * B < 8 ? 2 : 1;  // enough products in flight to hide their latency
    Sums<R, X, ROWS, B, CHAINS> sums;
    int64_t i = 0;
    for (; i + 2 <= blocks; i += 2) {
      sums.block(rows, i, x + i * STEP);
      sums.template block<2 % CHAINS>(rows, i + 1, x + (i + 1) * STEP);
    }
    if (i < blocks) sums.block(rows, i, x + i * STEP);
    if (w.stored % BLOCK) sums.tail(rows, w.stored, x + blocks * STEP);
    for (int r = 0; r < ROWS; ++r)
      for (int b = 0; b < B; ++b)
        out[r * B + b] = _mm512_reduce_add_ps(sums.sum(r, b)) * w.row_scale(std::min(first + r, last));
  } else {  // every 128 columns have a scale of their own: it multiplies their float32 sum
    constexpr int CHAINS = ROWS * B <= 2 ? 2 : 1;
    Sums<R, X, ROWS, B, 1> total;
    const int64_t all = (w.stored + BLOCK - 1) / BLOCK;
    for (int64_t i = 0; i < all; i += 2) {
      Sums<R, X, ROWS, B, CHAINS> group;
      for (int64_t j = i; j < std::min(i + 2, blocks); ++j) group.block(rows, j, x + j * STEP);
      if (blocks < all && i + 2 >= all) group.tail(rows, w.stored, x + blocks * STEP);
      for (int r = 0; r < ROWS; ++r) {
        const __m512 scale = _mm512_set1_ps(w.group_scale(std::min(first + r, last), i / 2));
        for (int b = 0; b < B; ++b) total.acc[r][b][0] = _mm512_fmadd_ps(group.sum(r, b), scale, total.acc[r][b][0]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int b = 0; b < B; ++b) out[r * B + b] = _mm512_reduce_add_ps(total.acc[r][b][0]);
  }
}

// x [M, columns] as tiles of up to TILE batch rows, each [block][rows of the tile][64], padded with zeros.
template <class X>
Tensor arrange(const Tensor& x, int64_t blocks) {
  const int64_t batch = x.size(0), columns = x.size(1);
  const Tensor typed = x.to(X::type).contiguous();
  if (batch == 1 && columns == blocks * BLOCK) return typed;
  Tensor ready = at::zeros({batch, blocks * BLOCK}, typed.options());
  using T = typename X::Scalar;
  const T* from = static_cast<const T*>(typed.const_data_ptr());
  T* to = static_cast<T*>(ready.mutable_data_ptr());
  for (int64_t done = 0; done < batch; done += TILE) {
    const int64_t rows = std::min(batch - done, TILE);
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t b = 0; b < rows; ++b) {
        const int64_t c = i * BLOCK, width = std::min(BLOCK, columns - c);
        if (width > 0)
          std::memcpy(to + done * blocks * BLOCK + (i * rows + b) * BLOCK, from + (done + b) * columns + c,
                      width * sizeof(T));
      }
  }
  return ready;
}

// Rows of W that share a read of x.  One alone, so that its bytes are one stream; few for int4, whose groups take
// registers of their own.
template <class R>
constexpr int rows_of(int64_t batch) {
  return batch == 1 ? 1 : batch == 2 || R::grouped ? 2 : 4;
}

template <class R, class X, class Y, int B>
inline void tile_out(const Operands& w, int64_t n, int64_t end, const typename X::Scalar* x, const Y* bias, Y* y) {
  constexpr int ROWS = rows_of<R>(B);
  for (; n < end; n += ROWS) {
    float sums[ROWS * B];
    tile<R, X, ROWS, B>(w, n, end - 1, x, sums);
    for (int64_t r = 0; r < std::min<int64_t>(ROWS, end - n); ++r)
      for (int b = 0; b < B; ++b)
        y[b * w.rows + n + r] = static_cast<Y>(sums[r * B + b] + (bias ? static_cast<float>(bias[n + r]) : 0.0f));
  }
}

template <class R, class X, class Y>
void stream(const Operands& w, const Tensor& x, const Y* bias, Y* y) {
  const int64_t batch = x.size(0), blocks = (w.stored + BLOCK - 1) / BLOCK;
  const Tensor ready = arrange<X>(x, blocks);
  const auto* data = static_cast<const typename X::Scalar*>(ready.const_data_ptr());
  at::parallel_for(0, w.rows, std::max<int64_t>(4, GRAIN / w.stored), [&](int64_t begin, int64_t end) {
    const int64_t step = rows_of<R>(std::min(batch, TILE));
    for (int64_t n = begin; n < end; n += step)
      for (int64_t b = 0; b < batch; b += TILE) {
        const auto* part = data + b * blocks * BLOCK;
        Y* out = y + b * w.rows;
        const int64_t stop = std::min(n + step, end);
        switch (std::min(batch - b, TILE)) {
          case 1: tile_out<R, X, Y, 1>(w, n, stop, part, bias, out); break;
          case 2: tile_out<R, X, Y, 2>(w, n, stop, part, bias, out); break;
          case 3: tile_out<R, X, Y, 3>(w, n, stop, part, bias, out); break;
          default: tile_out<R, X, Y, 4>(w, n, stop, part, bias, out);
        }
      }
  });
}

// ---- expansion of rows first .. last - 1 to a dense matrix [last - first, S]

inline void store16(float* to, __m512 v) { _mm512_storeu_ps(to, v); }
inline void store16(at::Half* to, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store16(at::BFloat16* to, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half(round_bf16(v, v), 0));
}

template <class R, class X, class Y>
void unpack(const Operands& w, int64_t first, int64_t last, Y* dense) {
  at::parallel_for(first, last, std::max<int64_t>(1, GRAIN / w.stored), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const R row(w.values, w.mask, n, w.stored);
      Y* to = dense + (n - first) * w.stored;
      const auto put = [&](const R& from, int64_t block, int64_t column, Y* out) {
        X one;
        from.block(block, one);
        __m512 parts[4];
        one.to_floats(parts);
        const float scale = R::grouped ? w.group_scale(n, column / SCALE_COLUMNS) : w.row_scale(n);
        for (int i = 0; i < 4; ++i) store16(out + 16 * i, _mm512_mul_ps(parts[i], _mm512_set1_ps(scale)));
      };
      const int64_t whole = w.stored - w.stored % BLOCK;
      for (int64_t c = 0; c < whole; c += BLOCK) put(row, c / BLOCK, c, to + c);
      if (whole < w.stored) {
        const Tail<R> tail(row, w.stored);
        Y last[BLOCK];
        put(tail.row, 0, whole, last);
        std::memcpy(to + whole, last, (w.stored - whole) * sizeof(Y));
      }
    }
  });
}

// ---- choosing: by the types of the values and of x

template <class R, class X, class Y>
void run(const Operands& w, const Tensor& x, const Maybe& bias, Tensor& y) {
  const Y* shift = bias ? bias->const_data_ptr<Y>() : nullptr;
  const int64_t batch = x.size(0), columns = x.size(1);
  if (batch <= R::MAX_STREAMED_BATCH) {
    stream<R, X, Y>(w, x, shift, y.mutable_data_ptr<Y>());
    return;
  }
  const int64_t height = std::min(w.rows, std::max<int64_t>(64, PANEL / w.stored));
  Tensor panel = at::empty({height, w.stored}, x.options());
  for (int64_t n = 0; n < w.rows; n += height) {
    const int64_t rows = std::min(height, w.rows - n);
    unpack<R, X, Y>(w, n, n + rows, panel.mutable_data_ptr<Y>());
    const Maybe part = bias ? Maybe(bias->narrow(0, n, rows)) : Maybe();
    y.narrow(1, n, rows).copy_(at::linear(x, panel.narrow(0, 0, rows).narrow(1, 0, columns), part));
  }
}

template <class Y, class X>
void choose(const Operands& w, at::ScalarType type, const Tensor& x, const Maybe& bias, Tensor& y) {
  const bool sparse = w.mask != nullptr;
  const auto go = [&](auto* reader) {
    run<std::remove_pointer_t<decltype(reader)>, X, Y>(w, x, bias, y);
  };
  if (type == at::kChar) return sparse ? go((SparseI8*)nullptr) : go((DenseI8*)nullptr);
  if (type == at::kByte) return sparse ? go((SparseI4*)nullptr) : go((DenseI4*)nullptr);
  if constexpr (std::is_same_v<Y, at::BFloat16>)
    return sparse ? go((SparseBf16*)nullptr) : go((DenseBf16*)nullptr);
  else if constexpr (std::is_same_v<Y, at::Half>)
    return go((SparseF16*)nullptr);
  else
    return sparse ? go((SparseF32*)nullptr) : go((DenseF32*)nullptr);
}

bool is_float(at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

// y [..., N] is written in full.  mask none: dense values.  Raises ValueError where types or shapes disagree.
void linear_out(
    const Tensor& x, const Tensor& values, const Maybe& mask, const Maybe& scale, const Maybe& bias, Tensor& y) {
  const auto type = values.scalar_type();
  const int64_t elements = values.size(1) * (type == at::kByte ? 2 : 1), rows = values.size(0);
  const int64_t stored = mask ? 2 * elements : elements, columns = x.size(-1);
  TORCH_CHECK_VALUE(is_float(x.scalar_type()), "secateur: x is ", x.scalar_type(),
                    ": expected a float of 16 or 32 bits");
  TORCH_CHECK_VALUE(scale ? !is_float(type) : type == x.scalar_type(), "secateur: values are ", type, " for x of ",
                    x.scalar_type(), scale ? " with" : " without", " a scale");
  TORCH_CHECK_VALUE(mask || type != at::kHalf, "secateur: dense float16 is torch's own linear");
  TORCH_CHECK_VALUE(stored % 8 == 0 && columns <= stored && columns > stored - 8, "secateur: x has ", columns,
                    " columns, the packed weight ", stored);
  TORCH_CHECK_VALUE(!mask || (mask->scalar_type() == at::kByte && mask->sizes() == at::IntArrayRef({rows, stored / 8})),
                    "secateur: mask is not uint8 [N, S/8]");
  const int64_t groups = type == at::kByte ? (stored + SCALE_COLUMNS - 1) / SCALE_COLUMNS : 1;
  TORCH_CHECK_VALUE(!scale || (scale->numel() == rows * groups && scale->size(0) == rows), "secateur: scale is not ",
                    type == at::kByte ? "[N, G]" : "[N]");
  TORCH_CHECK_VALUE(!bias || (bias->scalar_type() == x.scalar_type() && bias->sizes() == at::IntArrayRef({rows})),
                    "secateur: bias is not [N] of the dtype of x");
  const Tensor v = values.contiguous(), flat = x.reshape({-1, columns});
  const Maybe m = mask ? Maybe(mask->contiguous()) : Maybe(), b = bias ? Maybe(bias->contiguous()) : Maybe();
  const Maybe s = scale ? Maybe(scale->to(type == at::kByte ? at::kBFloat16 : at::kFloat).contiguous()) : Maybe();
  const Operands w{v.const_data_ptr(), m ? m->const_data_ptr() : nullptr, s ? s->const_data_ptr() : nullptr,
                   rows, stored, groups};
  if (flat.size(0) == 0) return;
  Tensor out = y.view({-1, rows});
  if (x.scalar_type() == at::kBFloat16) return choose<at::BFloat16, Bf16>(w, type, flat, b, out);
  if (x.scalar_type() == at::kHalf) return choose<at::Half, Fp32>(w, type, flat, b, out);
  return choose<float, Fp32>(w, type, flat, b, out);
}

Tensor linear(const Tensor& x, const Tensor& values, const Maybe& mask, const Maybe& scale, const Maybe& bias) {
  auto shape = x.sizes().vec();
  shape.back() = values.size(0);
  Tensor y = at::empty(shape, x.options());
  linear_out(x, values, mask, scale, bias, y);
  return y;
}
Tensor linear_24(const Tensor& x, const Tensor& v, const Tensor& m, const Maybe& b) { return linear(x, v, m, {}, b); }
Tensor linear_24_quantized(const Tensor& x, const Tensor& v, const Tensor& m, const Tensor& s, const Maybe& b) {
  return linear(x, v, m, s, b);
}
Tensor linear_quantized(const Tensor& x, const Tensor& v, const Tensor& s, const Maybe& b) {
  return linear(x, v, {}, s, b);
}

void implement(torch::Library& library) {
  library.impl("linear_24", TORCH_FN(linear_24));
  library.impl("linear_24_int8", TORCH_FN(linear_24_quantized));
  library.impl("linear_24_int4", TORCH_FN(linear_24_quantized));
  library.impl("linear_int8", TORCH_FN(linear_quantized));
  library.impl("linear_int4", TORCH_FN(linear_quantized));
}

// From now on the kernels of this file serve secateur::* on CPU.
void activate() {
  static torch::Library library(torch::Library::IMPL, "secateur", c10::DispatchKey::CPU, __FILE__, __LINE__);
  static const bool done = (implement(library), true);
  (void)done;
}

}  // namespace

LIBRARY(SECATEUR_NAMESPACE, m) {
  m.def("linear_out(Tensor x, Tensor values, Tensor? mask, Tensor? scale, Tensor? bias, Tensor(a!) y) -> ()");
  m.impl("linear_out", c10::DispatchKey::CPU, TORCH_FN(linear_out));
  m.def("activate() -> ()", TORCH_FN(activate));
}

extern "C" void secateur_register_standalone() {
  static torch::Library definitions(torch::Library::DEF, "secateur", std::nullopt, __FILE__, __LINE__);
  static const bool done = [] {
    definitions.def("linear_24(Tensor x, Tensor values, Tensor mask, Tensor? bias=None) -> Tensor");
    definitions.def("linear_24_int8(Tensor x, Tensor values, Tensor mask, Tensor scale, Tensor? bias=None) -> Tensor");
    definitions.def("linear_24_int4(Tensor x, Tensor values, Tensor mask, Tensor scale, Tensor? bias=None) -> Tensor");
    definitions.def("linear_int8(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor");
    definitions.def("linear_int4(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor");
    activate();
    return true;
  }();
  (void)done;
}
