// CPU kernels of the passes over tokens behind PowerNorm and UnifiedNorm.
//
// A token stays in the first-level cache between the sums over its groups and their use, and so does the row
// of partial sums that a chunk of tokens adds to. Each step is done for all groups of a token before the
// next: groups do not wait for each other, the end of a sum, a root and a quotient would.
#include <cmath>
#include <type_traits>

#include "common/twin.h"
#include "norm/channels.h"

NG_NAMESPACE_BEGIN
namespace {

// 1 / sqrt(mean(x^2) + eps) of each group of a token, from the sums of x^2.
template <class A>
void roots_of(int64_t groups, int64_t length, double eps, A* values) {
    for (int64_t g = 0; g < groups; ++g) {
        values[g] = A(1) / std::sqrt(values[g] / static_cast<A>(length) + static_cast<A>(eps));
    }
}

template <class A, class X>
void group_rstd(const X* token, int64_t groups, int64_t length, double eps, A* rstd) {
    for (int64_t g = 0; g < groups; ++g) {
        const X* x = token + g * length;
        rstd[g] = sum_twins<A>(length, [=](int64_t j, auto as) __attribute__((always_inline)) {
            const auto v = as(x + j);
            return v * v;
        });
    }
    roots_of(groups, length, eps, rstd);
}

// One token; all of its groups in one loop, so that what the loop needs is set up once.
template <class A, class X, bool Write, bool Sum>
void forward_token(const X* x, const A* rstd, int64_t groups, int64_t length, const A* scale, const A* bias,
                   X* y, A* squares) {
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * length;
        const A r = rstd[g];
        for_twins<A>(length, [=](int64_t i, auto as) __attribute__((always_inline)) {
            const int64_t j = first + i;
            const auto u = as(x + j) * r;
            if constexpr (Write) store_pack(y + j, u * as(scale + j) + as(bias + j));
            if constexpr (Sum) store_pack(squares + j, as(squares + j) + u * u);
        });
    }
}

template <class X>
void forward_chunks(const ChannelForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns, groups = args.groups > 0 ? args.groups : 1;
    const int64_t length = columns / groups;
    Scratch<A> rstd(groups);
    rstd.get()[0] = 1;
    const auto* pad_mask = static_cast<const uint8_t*>(args.pad_mask);
    const auto* condition = static_cast<const uint8_t*>(args.condition);
    const bool write = args.y != nullptr && (condition == nullptr || (*condition != 0) == args.wanted);
    if (!write && args.squares_partial == nullptr) return;
    const A* scale = static_cast<const A*>(args.scale);
    const A* bias = static_cast<const A*>(args.bias);

    for (int64_t chunk = begin; chunk < end; ++chunk) {
        A* squares = args.squares_partial ? row_of<A>(args.squares_partial, chunk, columns) : nullptr;
        for (int64_t j = 0; squares && j < columns; ++j) squares[j] = 0;
        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const bool sum = squares && !(pad_mask && pad_mask[row]);
            if (!sum && !write) continue;
            const X* x = row_of<X>(args.x, row, columns);
            X* y = write ? row_of<X>(args.y, row, columns) : nullptr;
            if (args.groups > 0) group_rstd(x, groups, length, args.eps, rstd.get());
            if (write && sum) {
                forward_token<A, X, true, true>(x, rstd.get(), groups, length, scale, bias, y, squares);
            } else if (write) {
                forward_token<A, X, true, false>(x, rstd.get(), groups, length, scale, bias, y, nullptr);
            } else {
                forward_token<A, X, false, true>(x, rstd.get(), groups, length, nullptr, nullptr, nullptr,
                                                 squares);
            }
        }
    }
}

// What one token needs.
template <class A, class X>
struct BackwardToken {
    const X *dy, *x;
    const A *scale, *projection;
    X* dx;
    A *products, *totals, *squares;
    int64_t groups, length;

    // 1 / sqrt(mean(x^2) + eps) and mean(du * u) of each group, in one pass: as u is a multiple of x, the
    // sums are of x^2, of dy * scale * x and of projection * x^2.
    template <bool Projected>
    void statistics(double eps, A* rstd, A* dots, A* projected) const {
        constexpr int lanes = Twin<A>::lanes;
        for (int64_t g = 0; g < groups; ++g) {
            typename Twin<A>::type squares = {}, products = {}, pulls = {};
            const BackwardToken t = *this;
            const auto add = [=](int64_t j, auto as, auto& squares, auto& products, auto& pulls)
                                 __attribute__((always_inline)) {
                                     const auto v = as(t.x + j);
                                     const auto square = v * v;
                                     squares += square;
                                     products += as(t.dy + j) * as(t.scale + j) * v;
                                     if constexpr (Projected) pulls += square * as(t.projection + j);
                                 };
            int64_t j = g * length;
            const int64_t end = j + length;
            for (; j + lanes <= end; j += lanes) add(j, AsTwin{}, squares, products, pulls);
            A square = sum_lanes(squares), product = sum_lanes(products), pull = 0;
            if constexpr (Projected) pull = sum_lanes(pulls);
            for (; j < end; ++j) add(j, AsScalar{}, square, product, pull);
            rstd[g] = square;
            dots[g] = product;
            projected[g] = pull;
        }
        roots_of(groups, length, eps, rstd);
        for (int64_t g = 0; g < groups; ++g) {
            dots[g] = (dots[g] - projected[g] * rstd[g]) * rstd[g] / static_cast<A>(length);
        }
    }

    template <bool Projected, bool Grouped, bool Write, bool Sum>
    void run(const A* rstd, const A* dots) const {
        const BackwardToken t = *this;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * length;
            const A r = rstd[g], dot = dots[g];
            for_twins<A>(length, [=](int64_t i, auto as) __attribute__((always_inline)) {
                const int64_t j = first + i;
                const auto dy = as(t.dy + j);
                const auto u = as(t.x + j) * r;
                if constexpr (Write) {
                    auto d = dy * as(t.scale + j);
                    if constexpr (Projected) d -= u * as(t.projection + j);
                    if constexpr (Grouped) d = (d - u * dot) * r;
                    store_pack(t.dx + j, d);
                }
                if constexpr (Sum) {
                    store_pack(t.products + j, as(t.products + j) + dy * u);
                    store_pack(t.totals + j, as(t.totals + j) + dy);
                    if constexpr (Grouped) store_pack(t.squares + j, as(t.squares + j) + u * u);
                }
            });
        }
    }
};

template <class X, bool Projected, bool Grouped, bool Write, bool Sum>
void backward_chunks(const ChannelBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns, groups = Grouped ? args.groups : 1, length = columns / groups;
    Scratch<A> rstd(groups), dots(groups), projected(groups);
    rstd.get()[0] = 1;
    dots.get()[0] = 0;
    const int64_t terms = channel_terms(args.groups);
    const auto* pad_mask = static_cast<const uint8_t*>(args.pad_mask);

    BackwardToken<A, X> token{};
    token.scale = static_cast<const A*>(args.scale);
    token.projection = static_cast<const A*>(args.projection);
    token.groups = groups;
    token.length = length;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        if constexpr (Sum) {
            A* sums = row_of<A>(args.sums_partial, chunk, terms * columns);
            for (int64_t j = 0; j < terms * columns; ++j) sums[j] = 0;
            token.products = sums;
            token.totals = sums + columns;
            if constexpr (Grouped) token.squares = sums + 2 * columns;
        }
        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            if constexpr (Write) token.dx = row_of<X>(args.dx, row, columns);
            if (pad_mask && pad_mask[row]) {
                for (int64_t j = 0; Write && j < columns; ++j) token.dx[j] = from_compute<X>(A(0));
                continue;
            }
            token.dy = row_of<X>(args.dy, row, columns);
            token.x = row_of<X>(args.x, row, columns);
            if constexpr (Grouped) {
                token.template statistics<Projected>(args.eps, rstd.get(), dots.get(), projected.get());
            }
            token.template run<Projected, Grouped, Write, Sum>(rstd.get(), dots.get());
        }
    }
}

template <class X, bool Projected>
void backward_of(const ChannelBackward& args, int64_t begin, int64_t end) {
    if (args.scale == nullptr) {  // dx may be null for want of tokens
        if constexpr (!Projected) backward_chunks<X, false, false, false, true>(args, begin, end);
    } else if (args.groups > 0) {
        if (args.sums_partial) return backward_chunks<X, Projected, true, true, true>(args, begin, end);
        backward_chunks<X, Projected, true, true, false>(args, begin, end);
    } else {
        if (args.sums_partial) return backward_chunks<X, Projected, false, true, true>(args, begin, end);
        backward_chunks<X, Projected, false, true, false>(args, begin, end);
    }
}

template <class X>
void backward_with_type(const ChannelBackward& args, int64_t begin, int64_t end) {
    if (args.projection) return backward_of<X, true>(args, begin, end);
    backward_of<X, false>(args, begin, end);
}

}  // namespace

void channel_forward_chunks(const ChannelForward& args, int64_t begin, int64_t end) {
    switch (args.x_type) {
        case DType::float64:
            return forward_chunks<double>(args, begin, end);
        case DType::bfloat16:
            return forward_chunks<bf16>(args, begin, end);
        case DType::float16:
            return forward_chunks<f16>(args, begin, end);
        default:
            return forward_chunks<float>(args, begin, end);
    }
}

void channel_backward_chunks(const ChannelBackward& args, int64_t begin, int64_t end) {
    switch (args.x_type) {
        case DType::float64:
            return backward_with_type<double>(args, begin, end);
        case DType::bfloat16:
            return backward_with_type<bf16>(args, begin, end);
        case DType::float16:
            return backward_with_type<f16>(args, begin, end);
        default:
            return backward_with_type<float>(args, begin, end);
    }
}

NG_NAMESPACE_END
