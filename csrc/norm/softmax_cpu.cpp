// CPU kernels of softmax, log-softmax and log-sum-exp, and of the gradients of the first two.
//
// Bytes: two-pass and online read a row twice and write it once; three-pass reads it three times, or once
// where it fits the cache. S is the type of the row that is read (that of x, or the compute type after
// masking), Y that of y, A = float, or double for double.
#include "common/row_cpu.h"
#include "common/twin.h"
#include "norm/exponentials_cpu.h"
#include "norm/softmax.h"

NG_NAMESPACE_BEGIN
namespace {

// The sum of a row: sum * e^shift, or sum * 2^shift where extended.
template <class A>
struct RowSum {
    A shift;
    double sum;
    bool extended;
    A factor() const { return static_cast<A>(1 / sum); }
};

int64_t segment_width(const SoftmaxForward& args, int64_t segment) {
    const int64_t left = args.columns - segment * softmax_segment;
    return left < softmax_segment ? left : softmax_segment;
}

// x + mask for `count` columns of a row, into `target`.
template <class A, class X>
void apply_mask(const SoftmaxForward& args, int64_t row, int64_t first, int64_t count, A* target) {
    const X* x = row_of<X>(args.x, row, args.columns) + first;
    const int64_t start = mapped_row(args.mask_rows, row) * args.columns + first;
    if (args.mask_type == DType::boolean) {
        const uint8_t* mask = static_cast<const uint8_t*>(args.mask) + start;
        for (int64_t j = 0; j < count; ++j) target[j] = mask[j] ? to_compute(x[j]) : -infinity<A>;
    } else {
        const char* mask = static_cast<const char*>(args.mask) + start * size_of(args.mask_type);
        widened<A>(mask, args.mask_type, A(0), A(0), count, target);
        for (int64_t j = 0; j < count; ++j) target[j] += to_compute(x[j]);
    }
}

template <class X, class Y>
class Rows {
  public:
    using A = compute_t<X>;
    using In = X;
    using Out = Y;

    explicit Rows(const SoftmaxForward& args)
        : args_(args),
          width_(args.columns < softmax_segment ? args.columns : softmax_segment),
          masked_(args.mask ? width_ : 0),
          kept_(one_read() ? width_ + Wide<A>::block : 0),
          partial_(args.partial ? 0 : 2 * args.segments) {}

    // A whole row by one thread.
    void run(int64_t row) {
        double* partial = args_.partial ? args_.partial + row * args_.segments * 2 : partial_.get();
        for (args_.phase = 0; args_.phase < phases(); ++args_.phase) {
            for (int64_t s = 0; s < args_.segments; ++s) reduce(row, s, partial);
        }
        const RowSum<A> sum = merge_row(row, partial);
        if (args_.y == nullptr) return;
        for (int64_t s = 0; s < args_.segments; ++s) write(row, s, sum);
    }

    void reduce(int64_t row, int64_t segment, double* partial) {
        source(row, segment, [&](auto load, int64_t count) {
            double* out = partial + 2 * segment;
            if (args_.algorithm == SoftmaxAlgorithm::two_pass) {
                const ExtendedSum<double> sum = extended_sum<A>(count, load);
                out[0] = sum.exponent, out[1] = sum.sum;
            } else if (args_.algorithm == SoftmaxAlgorithm::online) {
                const ShiftedSum<double> sum = online_sum<A>(count, load);
                out[0] = sum.shift, out[1] = sum.sum;
            } else if (args_.phase == 0) {
                out[0] = max_of<A>(count, load);
            } else {
                out[1] = sum_below<A>(count, load, row_maximum(partial), one_read() ? kept_.get() : nullptr);
            }
        });
    }

    RowSum<A> merge_row(int64_t row, double* partial) {
        RowSum<A> result{};
        if (args_.algorithm == SoftmaxAlgorithm::two_pass) {
            ExtendedSum<double> sum{partial[1], partial[0]};
            for (int64_t s = 1; s < args_.segments; ++s)
                sum = merge(sum, {partial[2 * s + 1], partial[2 * s]});
            result = {static_cast<A>(sum.exponent), sum.sum, true};
            if (!in_range<A>(sum)) result = against_maximum(row);
        } else if (args_.algorithm == SoftmaxAlgorithm::online) {
            ShiftedSum<double> sum{partial[1], partial[0]};
            for (int64_t s = 1; s < args_.segments; ++s)
                sum = merge(sum, {partial[2 * s + 1], partial[2 * s]});
            result = {static_cast<A>(sum.shift), sum.sum, false};
        } else {
            double sum = 0;
            for (int64_t s = 0; s < args_.segments; ++s) sum += partial[2 * s + 1];
            result = {row_maximum(partial), sum, false};
        }
        if (args_.lse || args_.mantissa) store_sum(row, result);
        return result;
    }

    void write(int64_t row, int64_t segment, const RowSum<A>& sum) {
        Y* y = row_of<Y>(args_.y, row, args_.columns) + segment * softmax_segment;
        const auto store = [y](auto whole, int64_t j, int count, WidePack<A> value) {
            if constexpr (decltype(whole)::value) {
                store_vector(y + j, value);
            } else {
                store_part<A>(y + j, count, value);
            }
        };
        const int64_t count = segment_width(args_, segment);
        if (args_.zero_masked && !sum.extended && sum.shift == -infinity<A> && sum.sum == 0) {
            const A value = args_.log ? -infinity<A> : A(0);
            for (int64_t j = 0; j < count; ++j) y[j] = from_compute<Y>(value);
            return;
        }
        if (one_read() && !sum.extended) {
            // All -inf gives 0 / 0 as it should.
            const A factor = sum.factor();
            const A* kept = kept_.get();
            for_wide<A>(count, [&](auto whole, int64_t j, int, int n) {
                store(whole, j, n, load_vector(kept + j) * factor);
            });
            return;
        }
        source(row, segment, [&](auto load, int64_t) {
            if (args_.log) {
                using C = ExpConstants<A>;
                const A shift = sum.extended ? sum.shift * C::ln2_high : sum.shift;
                const A logarithm = log_pack(WidePack<A>{} + static_cast<A>(sum.sum))[0];
                const A rest = sum.extended ? sum.shift * C::ln2_low + logarithm : logarithm;
                for_wide<A>(count, [&](auto whole, int64_t j, int, int n) {
                    store(whole, j, n, (load(whole, j, n) - shift) - rest);
                });
            } else if (sum.extended) {
                const A factor = sum.factor();
                for_wide<A>(count, [&](auto whole, int64_t j, int, int n) {
                    const auto parts = extended_parts(load(whole, j, n));
                    const auto power = power_of_two(parts.exponent - sum.shift);
                    store(whole, j, n, (parts.fraction * factor + factor) * power);  // rounded once less
                });
            } else {
                const A factor = sum.factor();
                for_wide<A>(count, [&](auto whole, int64_t j, int, int n) {
                    store(whole, j, n, exp_below(load(whole, j, n) - sum.shift) * factor);
                });
            }
        });
    }

  private:
    // The exponentials of a short row are kept between the sum and the result.
    bool one_read() const {
        return args_.algorithm == SoftmaxAlgorithm::three_pass && args_.segments == 1 && args_.y &&
               !args_.log;
    }
    int phases() const { return args_.algorithm == SoftmaxAlgorithm::three_pass ? 2 : 1; }

    // Calls f(load, count) for a segment of the masked row.
    template <class F>
    void source(int64_t row, int64_t segment, F f) {
        const int64_t first = segment * softmax_segment, count = segment_width(args_, segment);
        if (args_.mask) {
            apply_mask<A, X>(args_, row, first, count, masked_.get());
            f(loader<A>(static_cast<const A*>(masked_.get())), count);
        } else {
            f(loader<A>(row_of<X>(args_.x, row, args_.columns) + first), count);
        }
    }

    A row_maximum(const double* partial) const {
        double most = partial[0];
        for (int64_t s = 1; s < args_.segments; ++s) most = partial[2 * s] > most ? partial[2 * s] : most;
        return static_cast<A>(most);
    }

    // For rows that the extended form does not take.
    RowSum<A> against_maximum(int64_t row) {
        A most = -infinity<A>;
        double sum = 0;
        for (int64_t s = 0; s < args_.segments; ++s) {
            source(row, s, [&](auto load, int64_t count) {
                const A segment_most = max_of<A>(count, load);
                most = segment_most > most ? segment_most : most;
            });
        }
        for (int64_t s = 0; s < args_.segments; ++s) {
            source(row, s, [&](auto load, int64_t count) {
                sum += sum_below<A>(count, load, most, static_cast<A*>(nullptr));
            });
        }
        return {most, sum, false};
    }

    bool has_nan(int64_t row) {
        bool found = false;
        for (int64_t s = 0; s < args_.segments; ++s) {
            source(row, s, [&](auto load, int64_t count) {
                for_wide<A>(count, [&](auto whole, int64_t j, int, int n) {
                    const auto values = load(whole, j, n);
                    for (int i = 0; i < n; ++i) found |= values[i] != values[i];
                });
            });
        }
        return found;
    }

    void store_sum(int64_t row, const RowSum<A>& sum) {
        constexpr double ln2 = 0x1.62e42fefa39efp-1;
        double logarithm = std::log(sum.sum), mantissa = sum.sum, exponent = 0;
        if (sum.extended) {
            logarithm += sum.shift * ln2;
            exponent = sum.shift;
        } else if (sum.shift == infinity<A>) {
            if (!has_nan(row)) logarithm = mantissa = infinity<double>;
        } else if (sum.shift == -infinity<A>) {
            logarithm += sum.shift;
            exponent = sum.shift;
        } else {
            logarithm += sum.shift;
            exponent = std::nearbyint(sum.shift / ln2);
            mantissa *= std::exp(sum.shift - exponent * ln2);
        }
        if (args_.lse) static_cast<X*>(args_.lse)[row] = from_compute<X>(static_cast<A>(logarithm));
        if (args_.mantissa) {
            A rounded = static_cast<A>(mantissa);
            if (rounded > 0 && rounded < infinity<A>) {
                int steps;
                rounded = 2 * std::frexp(rounded, &steps);
                exponent += steps - 1;
            } else if (!(rounded == 0)) {
                exponent = 0;
            }
            static_cast<A*>(args_.mantissa)[row] = rounded;
            static_cast<A*>(args_.exponent)[row] = static_cast<A>(exponent);
        }
    }

    SoftmaxForward args_;
    int64_t width_;
    Scratch<A> masked_, kept_;
    Scratch<double> partial_;
};

// Rows of one chunk without a mask, a group of them at a time: each step in a row waits for the one before,
// and those of other rows fill the gaps. The same bits as those of Rows.
constexpr int64_t short_row = 1024;

template <bool Log, class X, class Y>
void short_rows(const SoftmaxForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    constexpr int group = 64 / sizeof(A);
    const int64_t columns = args.columns, stride = columns + Wide<A>::block;
    const Scratch<A> scratch(Log ? 0 : group * stride);
    for (int64_t first = begin; first < end; first += group) {
        const int rows = static_cast<int>(end - first < group ? end - first : group);
        A shift[group], sum[group], last[group];
        for (int r = 0; r < group; ++r) sum[r] = 1;
        for (int r = 0; r < rows; ++r) {
            shift[r] = max_of<A>(columns, loader<A>(row_of<X>(args.x, first + r, columns)));
        }
        for (int r = 0; r < rows; ++r) {
            const auto load = loader<A>(row_of<X>(args.x, first + r, columns));
            A* kept = scratch.get() + r * stride;
            const A base = shift_for(shift[r]);
            Block<A> total = Block<A>::all(0);
            for_wide<A>(columns, [&](auto whole, int64_t j, int p, int count) {
                const WidePack<A> term = exp_below(load(whole, j, count) - base);
                if constexpr (!Log) store_vector(kept + j, term);
                total.packs[p] += term;
            });
            sum[r] = fold_lanes<A>(total, [](auto a, auto b) { return a + b; });
        }
        for (int p = 0; p < group; p += Wide<A>::lanes) {
            const WidePack<A> sums = load_vector(sum + p);
            store_vector(last + p, Log ? log_pack(sums) : 1 / sums);
        }
        if (args.zero_masked) {
            for (int r = 0; r < rows; ++r) {
                if (shift[r] == -infinity<A> && sum[r] == 0) shift[r] = last[r] = 0;
            }
        }
        for (int r = 0; r < rows; ++r) {
            const auto load = loader<A>(row_of<X>(args.x, first + r, columns));
            const A* kept = scratch.get() + r * stride;
            Y* y = row_of<Y>(args.y, first + r, columns);
            for_wide<A>(columns, [&](auto whole, int64_t j, int, int count) {
                WidePack<A> value;
                if constexpr (Log) {
                    value = (load(whole, j, count) - shift[r]) - last[r];
                } else {
                    value = load_vector(kept + j) * last[r];
                }
                if constexpr (decltype(whole)::value) {
                    store_vector(y + j, value);
                } else {
                    store_part<A>(y + j, count, value);
                }
            });
        }
    }
}

template <class F>
void with_types(const SoftmaxForward& args, F f) {
    const bool wide = args.y_type == DType::float32;
    switch (args.x_type) {
        case DType::float64:
            return f(Rows<double, double>(args));
        case DType::bfloat16:
            return wide ? f(Rows<bf16, float>(args)) : f(Rows<bf16, bf16>(args));
        case DType::float16:
            return wide ? f(Rows<f16, float>(args)) : f(Rows<f16, f16>(args));
        default:
            return f(Rows<float, float>(args));
    }
}

// --- backward ------------------------------------------------------------------------------------

template <class X, class Y>
class BackwardRows {
  public:
    using A = compute_t<X>;

    explicit BackwardRows(const SoftmaxBackward& args) : args_(args) {}

    void run(int64_t row) {
        A sum = 0;
        for (int64_t s = 0; s < args_.segments; ++s) sum += reduce(row, s);
        for (int64_t s = 0; s < args_.segments; ++s) write(row, s, sum);
    }

    // sum(y dy), or sum(dy) for log-softmax.
    A reduce(int64_t row, int64_t segment) {
        const Y* dy = start<Y>(args_.dy, row, segment);
        const Y* y = start<Y>(args_.y, row, segment);
        if (args_.log) return sum_twins<A>(width(segment), [=](int64_t j, auto as) { return as(dy + j); });
        return sum_twins<A>(width(segment), [=](int64_t j, auto as) { return as(dy + j) * as(y + j); });
    }

    void write(int64_t row, int64_t segment, A sum) {
        const Y* dy = start<Y>(args_.dy, row, segment);
        const Y* y = start<Y>(args_.y, row, segment);
        X* dx = start<X>(const_cast<const void*>(args_.dx), row, segment);
        for_wide<A>(width(segment), [&](auto whole, int64_t j, int, int n) {
            const auto g = load(whole, dy + j, n), value = load(whole, y + j, n);
            const WidePack<A> d = args_.log ? g - exp_below(value) * sum : value * (g - sum);
            if constexpr (decltype(whole)::value) {
                store_vector(dx + j, d);
            } else {
                store_part<A>(dx + j, n, d);
            }
        });
        if (args_.mask) {
            const uint8_t* mask = static_cast<const uint8_t*>(args_.mask) +
                                  mapped_row(args_.mask_rows, row) * args_.columns +
                                  segment * softmax_segment;
            for (int64_t j = 0; j < width(segment); ++j) {
                if (!mask[j]) dx[j] = X{};
            }
        }
    }

  private:
    template <class T>
    static WidePack<A> load(std::true_type, const T* p, int) {
        return load_vector(p);
    }
    template <class T>
    static WidePack<A> load(std::false_type, const T* p, int count) {
        return load_part<A>(p, count, T{});
    }
    template <class T>
    T* start(const void* base, int64_t row, int64_t segment) const {
        return const_cast<T*>(row_of<T>(base, row, args_.columns)) + segment * softmax_segment;
    }
    int64_t width(int64_t segment) const {
        const int64_t left = args_.columns - segment * softmax_segment;
        return left < softmax_segment ? left : softmax_segment;
    }

    SoftmaxBackward args_;
};

template <class F>
void with_types(const SoftmaxBackward& args, F f) {
    const bool wide = args.y_type == DType::float32;
    switch (args.x_type) {
        case DType::float64:
            return f(BackwardRows<double, double>(args));
        case DType::bfloat16:
            return wide ? f(BackwardRows<bf16, float>(args)) : f(BackwardRows<bf16, bf16>(args));
        case DType::float16:
            return wide ? f(BackwardRows<f16, float>(args)) : f(BackwardRows<f16, f16>(args));
        default:
            return f(BackwardRows<float, float>(args));
    }
}

}  // namespace

void softmax_rows(const SoftmaxForward& args, int64_t begin, int64_t end) {
    const bool together = args.columns <= short_row && args.algorithm == SoftmaxAlgorithm::three_pass &&
                          args.y && !args.mask && !args.lse && !args.mantissa;
    with_types(args, [&](auto&& rows) {
        using R = std::decay_t<decltype(rows)>;
        if (together) {
            return args.log ? short_rows<true, typename R::In, typename R::Out>(args, begin, end)
                            : short_rows<false, typename R::In, typename R::Out>(args, begin, end);
        }
        for (int64_t row = begin; row < end; ++row) rows.run(row);
    });
}

void softmax_reduce(const SoftmaxForward& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto&& rows) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t row = unit / args.segments;
            rows.reduce(row, unit % args.segments, args.partial + 2 * row * args.segments);
        }
    });
}

void softmax_merge(const SoftmaxForward& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto&& rows) {
        for (int64_t row = begin; row < end; ++row) {
            const auto sum = rows.merge_row(row, args.partial + 2 * row * args.segments);
            double* stats = args.stats + 3 * row;
            stats[0] = sum.shift, stats[1] = sum.sum, stats[2] = sum.extended;
        }
    });
}

void softmax_write(const SoftmaxForward& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto&& rows) {
        using A = typename std::decay_t<decltype(rows)>::A;
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t row = unit / args.segments;
            const double* stats = args.stats + 3 * row;
            const RowSum<A> sum{static_cast<A>(stats[0]), stats[1], stats[2] != 0};
            rows.write(row, unit % args.segments, sum);
        }
    });
}

void softmax_backward_rows(const SoftmaxBackward& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto&& rows) {
        for (int64_t row = begin; row < end; ++row) rows.run(row);
    });
}

void softmax_backward_reduce(const SoftmaxBackward& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto&& rows) {
        for (int64_t unit = begin; unit < end; ++unit) {
            args.partial[unit] = rows.reduce(unit / args.segments, unit % args.segments);
        }
    });
}

void softmax_backward_write(const SoftmaxBackward& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto&& rows) {
        using A = typename std::decay_t<decltype(rows)>::A;
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t row = unit / args.segments;
            A sum = 0;
            for (int64_t s = 0; s < args.segments; ++s) {
                sum += static_cast<A>(args.partial[row * args.segments + s]);
            }
            rows.write(row, unit % args.segments, sum);
        }
    });
}

NG_NAMESPACE_END
