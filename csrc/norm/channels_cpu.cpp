// CPU kernels of the passes over tokens behind PowerNorm and UnifiedNorm.
//
// A token stays in the first-level cache between the sums over its groups and their use, and so does the row
// of partial sums that a chunk of tokens adds to. Each step is done for all groups of a token before the
// next: groups do not wait for each other, the end of a sum, a root and a quotient would.
#include <cmath>
#include <type_traits>

#include "common/row_cpu.h"
#include "norm/channels.h"

NG_NAMESPACE_BEGIN
namespace {

// 1 / sqrt(mean(x^2) + eps) of each group of a token.
template <class A, class X>
void group_rstd(const X* token, int64_t groups, int64_t length, double eps, A* rstd) {
    for (int64_t g = 0; g < groups; ++g) {
        const X* x = token + g * length;
        rstd[g] = sum_row<A>(
            length,
            [=](int64_t j) {
                const auto v = load_pack(x + j);
                return v * v;
            },
            [=](int64_t j) {
                const A v = to_compute(x[j]);
                return v * v;
            });
    }
    for (int64_t g = 0; g < groups; ++g) {
        rstd[g] = A(1) / std::sqrt(rstd[g] / static_cast<A>(length) + static_cast<A>(eps));
    }
}

// One piece of one token.
template <class A, class X, bool Write, bool Sum>
void forward_piece(const X* x, A rstd, const A* scale, const A* bias, X* y, A* squares, int64_t length) {
    for_row<A>(
        length,
        [=](int64_t j) {
            const auto u = load_pack(x + j) * rstd;
            if constexpr (Write) store_pack(y + j, u * load_pack(scale + j) + load_pack(bias + j));
            if constexpr (Sum) store_pack(squares + j, load_pack(squares + j) + u * u);
        },
        [=](int64_t j) {
            const A u = to_compute(x[j]) * rstd;
            if constexpr (Write) y[j] = from_compute<X>(u * scale[j] + bias[j]);
            if constexpr (Sum) squares[j] += u * u;
        });
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
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t j = g * length;
                const A r = rstd.get()[g];
                if (write && sum) {
                    forward_piece<A, X, true, true>(x + j, r, scale + j, bias + j, y + j, squares + j,
                                                    length);
                } else if (write) {
                    forward_piece<A, X, true, false>(x + j, r, scale + j, bias + j, y + j, nullptr, length);
                } else {
                    forward_piece<A, X, false, true>(x + j, r, nullptr, nullptr, nullptr, squares + j,
                                                     length);
                }
            }
        }
    }
}

// What one piece of one token needs; a null projection counts as zeros.
template <class A, class X>
struct BackwardPiece {
    const X *dy, *x;
    const A *scale, *projection;
    X* dx;
    A *products, *totals, *squares;
    int64_t length;

    template <bool Projected, class G, class U>
    NG_HOST_DEVICE auto du(int64_t j, G g, U u, std::true_type /*pack*/) const {
        auto value = g * load_pack(scale + j);
        if constexpr (Projected) value -= u * load_pack(projection + j);
        return value;
    }
    template <bool Projected, class G, class U>
    NG_HOST_DEVICE auto du(int64_t j, G g, U u, std::false_type) const {
        auto value = g * scale[j];
        if constexpr (Projected) value -= u * projection[j];
        return value;
    }

    // mean(du * u)
    template <bool Projected>
    A mean_dot(A rstd) const {
        const BackwardPiece p = *this;
        const A dot = sum_row<A>(
            length,
            [=](int64_t j) {
                const auto u = load_pack(p.x + j) * rstd;
                return p.template du<Projected>(j, load_pack(p.dy + j), u, std::true_type{}) * u;
            },
            [=](int64_t j) {
                const A u = to_compute(p.x[j]) * rstd;
                return p.template du<Projected>(j, A(to_compute(p.dy[j])), u, std::false_type{}) * u;
            });
        return dot / static_cast<A>(length);
    }

    template <bool Projected, bool Grouped, bool Write, bool Sum>
    void run(A rstd, A mean_dot) const {
        const BackwardPiece p = *this;
        for_row<A>(
            length,
            [=](int64_t j) {
                const auto g = load_pack(p.dy + j);
                const auto u = load_pack(p.x + j) * rstd;
                if constexpr (Write) {
                    auto d = p.template du<Projected>(j, g, u, std::true_type{});
                    if constexpr (Grouped) d = (d - u * mean_dot) * rstd;
                    store_pack(p.dx + j, d);
                }
                if constexpr (Sum) {
                    store_pack(p.products + j, load_pack(p.products + j) + g * u);
                    store_pack(p.totals + j, load_pack(p.totals + j) + g);
                    if constexpr (Grouped) store_pack(p.squares + j, load_pack(p.squares + j) + u * u);
                }
            },
            [=](int64_t j) {
                const A g = to_compute(p.dy[j]), u = to_compute(p.x[j]) * rstd;
                if constexpr (Write) {
                    A d = p.template du<Projected>(j, g, u, std::false_type{});
                    if constexpr (Grouped) d = (d - u * mean_dot) * rstd;
                    p.dx[j] = from_compute<X>(d);
                }
                if constexpr (Sum) {
                    p.products[j] += g * u;
                    p.totals[j] += g;
                    if constexpr (Grouped) p.squares[j] += u * u;
                }
            });
    }
};

template <class X, bool Projected, bool Grouped, bool Write, bool Sum>
void backward_chunks(const ChannelBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns, groups = Grouped ? args.groups : 1, length = columns / groups;
    Scratch<A> rstd(groups), mean_dot(groups);
    rstd.get()[0] = 1;
    mean_dot.get()[0] = 0;
    const int64_t terms = channel_terms(args.groups);
    const auto* pad_mask = static_cast<const uint8_t*>(args.pad_mask);

    for (int64_t chunk = begin; chunk < end; ++chunk) {
        A* sums = Sum ? row_of<A>(args.sums_partial, chunk, terms * columns) : nullptr;
        for (int64_t j = 0; Sum && j < terms * columns; ++j) sums[j] = 0;
        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            X* dx = Write ? row_of<X>(args.dx, row, columns) : nullptr;
            if (pad_mask && pad_mask[row]) {
                for (int64_t j = 0; Write && j < columns; ++j) dx[j] = from_compute<X>(A(0));
                continue;
            }
            const X *dy = row_of<X>(args.dy, row, columns), *x = row_of<X>(args.x, row, columns);
            const auto piece_of = [&](int64_t j) {
                BackwardPiece<A, X> piece{};
                piece.dy = dy + j;
                piece.x = x + j;
                if constexpr (Write) {
                    piece.scale = static_cast<const A*>(args.scale) + j;
                    if constexpr (Projected) piece.projection = static_cast<const A*>(args.projection) + j;
                    piece.dx = dx + j;
                }
                if constexpr (Sum) {
                    piece.products = sums + j;
                    piece.totals = sums + columns + j;
                    if constexpr (Grouped) piece.squares = sums + 2 * columns + j;
                }
                piece.length = length;
                return piece;
            };
            if constexpr (Grouped) {
                group_rstd(x, groups, length, args.eps, rstd.get());
                for (int64_t g = 0; g < groups; ++g) {
                    mean_dot.get()[g] = piece_of(g * length).template mean_dot<Projected>(rstd.get()[g]);
                }
            }
            for (int64_t g = 0; g < groups; ++g) {
                piece_of(g * length)
                    .template run<Projected, Grouped, Write, Sum>(rstd.get()[g], mean_dot.get()[g]);
            }
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
