// The XLA custom calls of attention on Hopper: one for each primitive. Each checks what it was
// given, builds the tensor maps and starts one kernel (fwd, lin) or two (bwd, hess, adj: queries'
// outputs, then keys') on XLA's stream. Nothing is allocated, so a call can join a command buffer.
// bwd_fused, hess_fused and adj_fused start one kernel, for d 64 only: it adds to outputs of
// queries that are set to zero before, in float32, dq without the factor `scale`.
//
// Operands and outputs are those of the primitive, in bfloat16 and (B, S, H, d) with d 64 or 128;
// statistics of queries are float32, (B, H, P) with S padded to a multiple P of 128: L in units of
// log 2 and +inf in the padding. Then follow segment ids (B, P), the least and greatest id of each
// streamed tile (B, P / tile, 2), and the first and last + 1 tile that share an id with each block
// of 128 positions (B, P / 128, 2); these are read where `segmented` is 1.
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <string>
#include <utility>

#include "forward.cuh"
#include "sweep.cuh"
#include "xla/ffi/api/ffi.h"

namespace attention {
namespace {

namespace ffi = xla::ffi;
using Tensor = ffi::Buffer<ffi::BF16, 4>;
using Statistic = ffi::Buffer<ffi::F32, 3>;
using Ids = ffi::Buffer<ffi::S32, 2>;
using Pairs = ffi::Buffer<ffi::S32, 3>;
using Sums = ffi::Buffer<ffi::F32, 4>;
template <class T> using Out = ffi::Result<T>;

// Positions of a streamed tile, and how many tiles are under way, by head dimension.
template <int D> constexpr int TILE = D == 64 ? 64 : 32;
template <Op OP, int D, Sweep SWEEP = Sweep::rows>
constexpr int STAGES = D == 64 && (SWEEP != Sweep::fused || OP == Op::bwd) ? 4
                       : OP == Op::hess                                    ? 2
                                                                           : 3;
constexpr int FORWARD_TILE = 128;

// What is the same for the calls of one primitive.
struct Problem {
    cudaStream_t stream;
    float scale;
    Band band;
    bool segmented;
    int batch, queries, keys, heads, key_heads, width, padded;
    const int *ids;
    const int2 *spans, *reach;
};

ffi::Error refused(std::string what) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "attention on Hopper: " + std::move(what));
}

ffi::Error check(Problem &p, cudaStream_t stream, float scale, int64_t left, int64_t right,
                 int64_t segmented, const Tensor &q, const Tensor &k, const Ids &ids,
                 const Pairs &spans, const Pairs &reach, int tile) {
    const auto a = q.dimensions(), b = k.dimensions();
    if (a[0] != b[0] || a[3] != b[3] || b[2] == 0 || a[2] % b[2] || (a[3] != 64 && a[3] != 128))
        return refused("q and k do not fit; expected (B, S, H, d) and (B, S_k, H_kv, d), H a "
                       "multiple of H_kv, d 64 or 128.");
    if (a[0] > 65535 || a[2] > 65535 || a[1] >= UNLIMITED / 2 || b[1] >= UNLIMITED / 2)
        return refused("B and H may be 65535, and S and S_k 2^28, at most.");
    const int64_t padded = (a[1] + BLOCK - 1) / BLOCK * BLOCK;
    if (segmented) {
        const auto i = ids.dimensions(), s = spans.dimensions(), r = reach.dimensions();
        if (a[1] != b[1] || i[0] != a[0] || i[1] != padded || s[0] != a[0] ||
            s[1] != padded / tile || s[2] != 2 || r[0] != a[0] || r[1] != padded / BLOCK ||
            r[2] != 2)
            return refused("segment ids or their tables do not fit q and k.");
    }
    auto side = [](int64_t x) { return int(x < 0 || x > UNLIMITED ? UNLIMITED : x); };
    p = {stream, scale, {side(left), side(right)}, segmented != 0, int(a[0]), int(a[1]), int(b[1]),
         int(a[2]), int(b[2]), int(a[3]), int(padded),
         segmented ? ids.typed_data() : nullptr,
         reinterpret_cast<const int2 *>(spans.typed_data()),
         reinterpret_cast<const int2 *>(reach.typed_data())};
    return ffi::Error::Success();
}

template <class X> bool like_queries(const Problem &p, const X &x) {
    const auto d = x.dimensions();
    return d[0] == p.batch && d[1] == p.queries && d[2] == p.heads && d[3] == p.width;
}
bool like_keys(const Problem &p, const Tensor &x) {
    const auto d = x.dimensions();
    return d[0] == p.batch && d[1] == p.keys && d[2] == p.key_heads && d[3] == p.width;
}
bool like_statistic(const Problem &p, const Statistic &x, int length) {
    const auto d = x.dimensions();
    return d[0] == p.batch && d[1] == p.heads && d[2] == length;
}

bf16 *data(const Tensor &x) { return reinterpret_cast<bf16 *>(x.untyped_data()); }

// Starts a kernel with its shared memory, which each device has to allow once.
template <class Parameters>
ffi::Error start(void (*kernel)(Parameters), const Parameters &parameters, int bytes, dim3 grid,
                 cudaStream_t stream, std::atomic<uint64_t> &allowed) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (error == cudaSuccess && (device >= 64 || !(allowed.load() & bit))) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error == cudaSuccess && device < 64) allowed.fetch_or(bit);
    }
    if (error == cudaSuccess) {
        void *arguments[] = {const_cast<Parameters *>(&parameters)};
        error = cudaLaunchKernel(kernel, grid, dim3(THREADS), arguments, bytes, stream);
    }
    if (error == cudaSuccess) return ffi::Error::Success();
    return ffi::Error(ffi::ErrorCode::kInternal,
                      std::string("attention on Hopper: ") + cudaGetErrorString(error));
}

template <Op OP> struct Operands {
    std::array<bf16 *, Parts<OP>::queries> queries;
    std::array<bf16 *, Parts<OP>::keys> keys;
    std::array<float *, Parts<OP>::statistics> statistics;
    std::array<float *, 2> sums;
};

template <Op OP, int D, Sweep SWEEP, size_t OUTPUTS>
ffi::Error run_sweep(const Problem &p, const Operands<OP> &x, std::array<bf16 *, OUTPUTS> outputs,
                     std::array<float *, 2> added = {}) {
    using G = Parameters<OP, D, TILE<D>, SWEEP>;
    constexpr bool COLUMNS = G::COLUMNS;
    constexpr int stages = STAGES<OP, D, SWEEP>;
    constexpr int bytes = sweep_bytes<OP, D, TILE<D>, stages, SWEEP>;
    static_assert(bytes + 5120 <= MAX_SHARED_MEMORY);  // and the static part
    const auto &held = [&]() -> auto & {
        if constexpr (COLUMNS) return x.keys;
        else return x.queries;
    }();
    const auto &streamed = [&]() -> auto & {
        if constexpr (COLUMNS) return x.queries;
        else return x.keys;
    }();
    const int held_length = COLUMNS ? p.keys : p.queries;
    const int held_heads = COLUMNS ? p.key_heads : p.heads;
    const int streamed_length = COLUMNS ? p.queries : p.keys;
    const int streamed_heads = COLUMNS ? p.heads : p.key_heads;
    auto resident = [&](bf16 *at) {
        return typename G::HeldArray(at, p.batch, held_length, held_heads, D);
    };
    auto stream = [&](bf16 *at) {
        return typename G::Array(at, p.batch, streamed_length, streamed_heads, D);
    };
    auto statistic = [&](float *at) {
        return typename G::Statistic(at, p.batch, p.heads, 1, p.padded);
    };
    auto base = [&]<size_t... N>(std::index_sequence<N...>) {
        using Base = Added<OP, D, TILE<D>, SWEEP == Sweep::fused>;
        if constexpr (SWEEP == Sweep::fused)
            return Base{{typename Base::Sum(added[N], p.batch, p.queries, p.heads, D)...}};
        else return Base{};
    };
    auto build = [&]<size_t... R, size_t... O, size_t... S, size_t... V>(
                     std::index_sequence<R...>, std::index_sequence<O...>,
                     std::index_sequence<S...>, std::index_sequence<V...>) {
        return G{base(std::make_index_sequence<OP == Op::adj ? 2 : 1>()),
                 {resident(held[R])...}, {resident(outputs[O])...}, {stream(streamed[S])...},
                 {statistic(x.statistics[V])...}, {x.sums[0], x.sums[1]}, p.ids, p.spans,
                 p.reach, p.queries, p.keys, p.padded,
                 p.heads / p.key_heads, p.band, p.scale, p.scale * 1.44269504089f};
    };
    const G parameters = build(std::make_index_sequence<G::held>(),
                               std::make_index_sequence<OUTPUTS>(),
                               std::make_index_sequence<G::streamed>(),
                               std::make_index_sequence<G::P::statistics>());
    static std::atomic<uint64_t> allowed{0};
    return start(sweep<OP, D, TILE<D>, stages, SWEEP>, parameters, bytes,
                 dim3((held_length + BLOCK - 1) / BLOCK, held_heads, p.batch), p.stream, allowed);
}

// Both sweeps: what is per query, then what is per key.
template <Op OP, size_t ROWS, size_t COLUMNS>
ffi::Error run_sweeps(const Problem &p, const Operands<OP> &x, std::array<bf16 *, ROWS> rows,
                      std::array<bf16 *, COLUMNS> columns) {
    try {
        ffi::Error error = p.width == 64 ? run_sweep<OP, 64, Sweep::rows>(p, x, rows)
                                         : run_sweep<OP, 128, Sweep::rows>(p, x, rows);
        if constexpr (COLUMNS > 0) {
            if (error.success()) {
                error = p.width == 64 ? run_sweep<OP, 64, Sweep::columns>(p, x, columns)
                                      : run_sweep<OP, 128, Sweep::columns>(p, x, columns);
            }
        }
        return error;
    } catch (const std::exception &failure) {  // of a tensor map
        return ffi::Error(ffi::ErrorCode::kInternal, failure.what());
    }
}

// One sweep that adds to outputs of queries.
template <Op OP>
ffi::Error run_fused(const Problem &p, const Operands<OP> &x, std::array<float *, 2> added,
                     std::array<bf16 *, 2> columns) {
    if (p.width != 64) return refused("a fused call takes d 64 only.");
    const size_t rows = size_t(p.batch) * p.queries * p.heads * sizeof(float);
    auto clear = [&](float *at, size_t bytes) {
        return at == nullptr || bytes == 0 ||
               cudaMemsetAsync(at, 0, bytes, p.stream) == cudaSuccess;
    };
    for (int n = 0; n < 2; n++) {
        if (!clear(added[n], rows * p.width) || !clear(x.sums[n], rows))
            return ffi::Error(ffi::ErrorCode::kInternal,
                              "attention on Hopper: outputs could not be set to zero");
    }
    try {
        return run_sweep<OP, 64, Sweep::fused>(p, x, columns, added);
    } catch (const std::exception &failure) {  // of a tensor map
        return ffi::Error(ffi::ErrorCode::kInternal, failure.what());
    }
}

template <int D>
ffi::Error run_forward(const Problem &p, const Tensor &q, const Tensor &k, const Tensor &v,
                       const Tensor &o, float *norm) {
    using G = ForwardParameters<D, FORWARD_TILE>;
    constexpr int stages = D == 64 ? 4 : 3, bytes = forward_bytes<D, FORWARD_TILE, stages>;
    static_assert(bytes + 1024 <= MAX_SHARED_MEMORY);
    const G parameters{typename G::HeldArray(data(q), p.batch, p.queries, p.heads, D),
                       typename G::HeldArray(data(o), p.batch, p.queries, p.heads, D),
                       typename G::Array(data(k), p.batch, p.keys, p.key_heads, D),
                       typename G::Array(data(v), p.batch, p.keys, p.key_heads, D),
                       norm, p.ids, p.spans, p.reach, p.queries, p.keys, p.padded,
                       p.heads / p.key_heads, p.band, p.scale * 1.44269504089f};
    static std::atomic<uint64_t> allowed{0};
    return start(forward<D, FORWARD_TILE, stages>, parameters, bytes,
                 dim3(p.padded / BLOCK, p.heads, p.batch), p.stream, allowed);
}

#define PROBLEM cudaStream_t stream, float scale, int64_t left, int64_t right, int64_t segmented
#define TABLES Ids ids, Pairs spans, Pairs reach
#define CHECK(TILE_OF, FITS)                                                                      \
    Problem p;                                                                                    \
    if (ffi::Error error = check(p, stream, scale, left, right, segmented, q, k, ids, spans,      \
                                 reach, TILE_OF);                                                 \
        error.failure())                                                                          \
        return error;                                                                             \
    if (!(FITS)) return refused("operands or results do not fit q and k.");
#define SWEEP_TILE (q.dimensions()[3] == 64 ? TILE<64> : TILE<128>)

ffi::Error fwd(PROBLEM, Tensor q, Tensor k, Tensor v, TABLES, Out<Tensor> o, Out<Statistic> norm) {
    CHECK(FORWARD_TILE, like_keys(p, v) && like_queries(p, *o) &&
                            like_statistic(p, *norm, p.queries))
    try {
        return p.width == 64 ? run_forward<64>(p, q, k, v, *o, norm->typed_data())
                             : run_forward<128>(p, q, k, v, *o, norm->typed_data());
    } catch (const std::exception &failure) {  // of a tensor map
        return ffi::Error(ffi::ErrorCode::kInternal, failure.what());
    }
}

ffi::Error lin(PROBLEM, Tensor q, Tensor k, Tensor v, Statistic norm, Tensor a, Tensor b, Tensor c,
               TABLES, Out<Tensor> u, Out<Statistic> r) {
    CHECK(SWEEP_TILE, like_keys(p, v) && like_statistic(p, norm, p.padded) && like_queries(p, a) &&
                          like_keys(p, b) && like_keys(p, c) && like_queries(p, *u) &&
                          like_statistic(p, *r, p.queries))
    const Operands<Op::lin> x{{data(q), data(a)}, {data(k), data(v), data(b), data(c)},
                              {norm.typed_data()}, {r->typed_data(), nullptr}};
    return run_sweeps(p, x, std::array{data(*u)}, std::array<bf16 *, 0>{});
}

// The type of an output of queries says which variant is meant: fused ones add, in float32.
template <class Q> constexpr bool FUSED = std::is_same_v<Q, Sums>;

template <class Q>
ffi::Error bwd(PROBLEM, Tensor q, Tensor k, Tensor v, Statistic norm, Tensor go, Statistic d,
               TABLES, Out<Q> dq, Out<Tensor> dk, Out<Tensor> dv) {
    CHECK(SWEEP_TILE, like_keys(p, v) && like_statistic(p, norm, p.padded) && like_queries(p, go) &&
                          like_statistic(p, d, p.padded) && like_queries(p, *dq) &&
                          like_keys(p, *dk) && like_keys(p, *dv))
    const Operands<Op::bwd> x{{data(q), data(go)}, {data(k), data(v)},
                              {norm.typed_data(), d.typed_data()}, {nullptr, nullptr}};
    const std::array columns{data(*dk), data(*dv)};
    if constexpr (FUSED<Q>) return run_fused(p, x, {dq->typed_data(), nullptr}, columns);
    else return run_sweeps(p, x, std::array{data(*dq)}, columns);
}

template <class Q>
ffi::Error hess(PROBLEM, Tensor q, Tensor k, Tensor v, Statistic norm, Tensor go, Statistic d,
                Tensor tq, Tensor tk, Tensor tv, Statistic tnorm, Tensor tgo, Statistic td, TABLES,
                Out<Q> dq, Out<Tensor> dk, Out<Tensor> dv) {
    CHECK(SWEEP_TILE, like_keys(p, v) && like_statistic(p, norm, p.padded) && like_queries(p, go) &&
                          like_statistic(p, d, p.padded) && like_queries(p, tq) &&
                          like_keys(p, tk) && like_keys(p, tv) &&
                          like_statistic(p, tnorm, p.padded) && like_queries(p, tgo) &&
                          like_statistic(p, td, p.padded) && like_queries(p, *dq) &&
                          like_keys(p, *dk) && like_keys(p, *dv))
    const Operands<Op::hess> x{
        {data(q), data(go), data(tq), data(tgo)}, {data(k), data(v), data(tk), data(tv)},
        {norm.typed_data(), d.typed_data(), tnorm.typed_data(), td.typed_data()},
        {nullptr, nullptr}};
    const std::array columns{data(*dk), data(*dv)};
    if constexpr (FUSED<Q>) return run_fused(p, x, {dq->typed_data(), nullptr}, columns);
    else return run_sweeps(p, x, std::array{data(*dq)}, columns);
}

template <class Q>
ffi::Error adj(PROBLEM, Tensor q, Tensor k, Tensor v, Statistic norm, Tensor go, Statistic d,
               Tensor a, Tensor b, Tensor c, TABLES, Out<Q> cq, Out<Tensor> ck, Out<Tensor> cv,
               Out<Statistic> cnorm, Out<Q> cgo, Out<Statistic> cd) {
    CHECK(SWEEP_TILE, like_keys(p, v) && like_statistic(p, norm, p.padded) && like_queries(p, go) &&
                          like_statistic(p, d, p.padded) && like_queries(p, a) &&
                          like_keys(p, b) && like_keys(p, c) && like_queries(p, *cq) &&
                          like_keys(p, *ck) && like_keys(p, *cv) && like_queries(p, *cgo) &&
                          like_statistic(p, *cnorm, p.queries) &&
                          like_statistic(p, *cd, p.queries))
    const Operands<Op::adj> x{{data(q), data(go), data(a)}, {data(k), data(v), data(b), data(c)},
                              {norm.typed_data(), d.typed_data()},
                              {cnorm->typed_data(), cd->typed_data()}};
    const std::array columns{data(*ck), data(*cv)};
    if constexpr (FUSED<Q>) return run_fused(p, x, {cq->typed_data(), cgo->typed_data()}, columns);
    else return run_sweeps(p, x, std::array{data(*cq), data(*cgo)}, columns);
}

auto begin() {
    return ffi::Ffi::Bind()
        .Ctx<ffi::PlatformStream<cudaStream_t>>()
        .Attr<float>("scale")
        .Attr<int64_t>("left")
        .Attr<int64_t>("right")
        .Attr<int64_t>("segmented")
        .Arg<Tensor>()   // q
        .Arg<Tensor>()   // k
        .Arg<Tensor>();  // v
}

}  // namespace
}  // namespace attention

#define END .Arg<attention::Ids>().Arg<attention::Pairs>().Arg<attention::Pairs>()
#define T .Arg<attention::Tensor>()
#define S .Arg<attention::Statistic>()
#define TO .Ret<attention::Tensor>()
#define SO .Ret<attention::Statistic>()
#define QO .Ret<attention::Sums>()
#define CALL(NAME, FUNCTION, BINDING)                                                    \
    XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_hopper_##NAME, attention::FUNCTION,          \
                                  (attention::begin() BINDING),                          \
                                  {xla::ffi::Traits::kCmdBufferCompatible})

CALL(fwd, fwd, END TO SO);
CALL(lin, lin, S T T T END TO SO);
CALL(bwd, bwd<attention::Tensor>, S T S END TO TO TO);
CALL(bwd_fused, bwd<attention::Sums>, S T S END QO TO TO);
CALL(hess, hess<attention::Tensor>, S T S T T T S T S END TO TO TO);
CALL(hess_fused, hess<attention::Sums>, S T S T T T S T S END QO TO TO);
CALL(adj, adj<attention::Tensor>, S T S T T T END TO TO TO SO TO SO);
CALL(adj_fused, adj<attention::Sums>, S T S T T T END QO TO TO SO QO SO);
