// CPU kernels of cross-entropy.
//
// Bytes: the logits once from memory; with the gradient a second sweep finds the row in the cache, and writes
// it once. Arithmetic is in A = float (double for double), that of single numbers of a row in double.
#include "common/row_cpu.h"
#include "norm/cross_entropy.h"
#include "norm/exponentials_cpu.h"

NG_NAMESPACE_BEGIN
namespace {

// Up to here the exponentials of a row are kept for the gradient, and beyond computed again.
constexpr int64_t kept_columns = 65536;

template <class X>
class LossRows {
  public:
    using A = compute_t<X>;

    explicit LossRows(const CrossEntropy& args)
        : args_(args),
          keep_(args.dlogits && args.columns <= kept_columns),
          capped_(args.softcap > 0 ? args.columns + Wide<A>::block : 0),
          kept_(keep_ ? args.columns + Wide<A>::block : 0),
          weights_(args.weight ? args.columns + Wide<A>::block : 0),
          weight_sum_(static_cast<double>(args.columns)),
          scale_(args.scale ? *static_cast<const A*>(args.scale) : A(1)) {
        if (args.weight) {
            widened<A>(args.weight, args.weight_type, A(0), A(0), args.columns, weights_.get());
            weight_sum_ = 0;
            for (int64_t j = 0; j < args.columns; ++j) weight_sum_ += weights_.get()[j];
        }
    }

    void run(int64_t row) {
        const int64_t k = args_.target[row];
        X* dlogits = args_.dlogits ? row_of<X>(args_.dlogits, row, args_.columns) : nullptr;
        if (k == args_.ignore_index) {
            static_cast<A*>(args_.loss)[row] = static_cast<A*>(args_.lse)[row] = 0;
            for (int64_t j = 0; dlogits && j < args_.columns; ++j) dlogits[j] = X{};
            return;
        }
        const X* logits = row_of<X>(args_.logits, row, args_.columns);
        if (args_.softcap > 0) {
            const A cap = static_cast<A>(args_.softcap);
            A* capped = capped_.get();
            for_wide<A>(args_.columns, [&](auto whole, int64_t j, int, int n) {
                store_vector(capped + j, cap * tanh(loader<A>(logits)(whole, j, n) / cap));
            });
            run_row(row, k, loader<A>(static_cast<const A*>(capped)), static_cast<double>(capped[k]),
                    dlogits);
        } else {
            run_row(row, k, loader<A>(logits), static_cast<double>(to_compute(logits[k])), dlogits);
        }
    }

  private:
    template <class Load>
    void run_row(int64_t row, int64_t k, Load load, double z_k, X* dlogits) {
        const int64_t columns = args_.columns;
        ExtendedSum<double> extended{0, 0};
        ShiftedSum<double> shifted{0, 0};
        bool use_extended = !keep_;
        if (use_extended) {
            extended = extended_sum<A>(columns, load);
            use_extended = in_range<A>(extended);
        }
        if (!use_extended) {
            const A most = max_of<A>(columns, load);
            shifted = {sum_below<A>(columns, load, most, keep_ ? kept_.get() : nullptr),
                       static_cast<double>(most)};
        }
        constexpr double ln2 = 0x1.62e42fefa39efp-1;
        const double lse = use_extended ? extended.exponent * ln2 + std::log(extended.sum)
                                        : shifted.shift + std::log(shifted.sum);
        const double w_k = args_.weight ? weights_.get()[k] : 1.0, s = args_.label_smoothing,
                     per_class = s / static_cast<double>(columns);
        double loss = (1 - s) * w_k * (lse - z_k) + args_.z_loss * lse * lse;
        if (s > 0) {
            const double base = std::isfinite(z_k) ? z_k : 0.0;
            loss += per_class * (weight_sum_ * (lse - base) - weighted_sum(load, static_cast<A>(base)));
        }
        static_cast<A*>(args_.loss)[row] = static_cast<A>(loss);
        static_cast<A*>(args_.lse)[row] = static_cast<A>(lse);
        if (dlogits == nullptr) return;

        const double factor = (1 - s) * w_k + per_class * weight_sum_ + 2 * args_.z_loss * lse;
        const A scaled = static_cast<A>(factor * scale_), smooth = static_cast<A>(per_class * scale_);
        const double cap = args_.softcap;
        double d_k = (std::exp(z_k - lse) * factor - (per_class + (1 - s)) * w_k) * scale_;
        if (cap > 0) d_k *= 1 - (z_k / cap) * (z_k / cap);

        if (keep_) {
            const A one = scaled / static_cast<A>(shifted.sum);
            const A* kept = kept_.get();
            write_gradient(load, dlogits, smooth,
                           [&](auto, int64_t j, int) { return load_vector(kept + j) * one; });
        } else if (use_extended) {
            const A one = scaled / static_cast<A>(extended.sum), top = static_cast<A>(extended.exponent);
            write_gradient(load, dlogits, smooth, [&](auto whole, int64_t j, int n) {
                const auto parts = extended_parts(load(whole, j, n));
                return (parts.fraction + 1) * one * power_of_two(parts.exponent - top);
            });
        } else {
            const A one = scaled / static_cast<A>(shifted.sum), shift = static_cast<A>(shifted.shift);
            write_gradient(load, dlogits, smooth, [&](auto whole, int64_t j, int n) {
                return exp_below(load(whole, j, n) - shift) * one;
            });
        }
        dlogits[k] = from_compute<X>(static_cast<A>(d_k));
    }

    // Sum of w_j (z_j - base).
    template <class Load>
    double weighted_sum(Load load, A base) {
        double total = 0;
        const A* weights = args_.weight ? weights_.get() : nullptr;
        for_chunks(args_.columns, [&](int64_t first, int64_t chunk) {
            Block<A> sum = Block<A>::all(0);
            for_wide<A>(chunk, [&](auto whole, int64_t j, int p, int n) {
                WidePack<A> term = load(whole, first + j, n) - base;
                if (weights) term *= load_vector(weights + first + j);
                if constexpr (!decltype(whole)::value) {
                    for (int i = n; i < Wide<A>::lanes; ++i) term[i] = 0;
                }
                sum.packs[p] += term;
            });
            total += fold_lanes<A>(sum, [](auto a, auto b) { return a + b; });
        });
        return total;
    }

    template <class Load, class Probability>
    void write_gradient(Load load, X* dlogits, A smooth, Probability probability) {
        const A* weights = args_.weight ? weights_.get() : nullptr;
        const auto write = [&](auto with_options) {
            for_wide<A>(args_.columns, [&](auto whole, int64_t j, int, int n) {
                WidePack<A> d = probability(whole, j, n);
                if constexpr (decltype(with_options)::value) {
                    d -= weights ? load_vector(weights + j) * smooth : WidePack<A>{} + smooth;
                    if (args_.softcap > 0) {
                        const WidePack<A> ratio = load(whole, j, n) / static_cast<A>(args_.softcap);
                        d *= 1 - ratio * ratio;
                    }
                }
                if constexpr (decltype(whole)::value) {
                    store_vector(dlogits + j, d);
                } else {
                    store_part<A>(dlogits + j, n, d);
                }
            });
        };
        args_.label_smoothing > 0 || args_.softcap > 0 ? write(std::true_type{}) : write(std::false_type{});
    }

    const CrossEntropy& args_;
    bool keep_;
    Scratch<A> capped_, kept_, weights_;
    double weight_sum_;
    A scale_;
};

template <class X>
void run_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
    LossRows<X> rows(args);
    for (int64_t row = begin; row < end; ++row) rows.run(row);
}

template <class X>
void scale(const ScaleRows& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    for (int64_t row = begin; row < end; ++row) {
        const A factor = static_cast<const A*>(args.factor)[args.one_factor ? 0 : row];
        if (factor == 1) continue;
        X* x = row_of<X>(args.x, row, args.columns);
        for_row<A>(
            args.columns, [=](int64_t j) { store_pack(x + j, load_pack(x + j) * factor); },
            [=](int64_t j) { x[j] = from_compute<X>(to_compute(x[j]) * factor); });
    }
}

}  // namespace

void cross_entropy_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
    switch (args.type) {
        case DType::float64:
            return run_rows<double>(args, begin, end);
        case DType::bfloat16:
            return run_rows<bf16>(args, begin, end);
        case DType::float16:
            return run_rows<f16>(args, begin, end);
        default:
            return run_rows<float>(args, begin, end);
    }
}

void scale_rows(const ScaleRows& args, int64_t begin, int64_t end) {
    switch (args.type) {
        case DType::float64:
            return scale<double>(args, begin, end);
        case DType::bfloat16:
            return scale<bf16>(args, begin, end);
        case DType::float16:
            return scale<f16>(args, begin, end);
        default:
            return scale<float>(args, begin, end);
    }
}

NG_NAMESPACE_END
