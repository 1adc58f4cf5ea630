// Adafactor: the bindings.
#include "optim/adafactor.h"

#include "optim/elementwise_binding.h"

#if !NARROWGAUGE_CPU
#include "optim/adafactor_launch.h"
#endif

namespace narrowgauge {
namespace {

struct Table {
    AdafactorArgs args{};
    std::vector<AdafactorTensor> tensors;
    int64_t rows = 0, columns = 0, row_partials = 0, column_partials = 0;
    DType compute() const { return args.param_type == DType::float64 ? DType::float64 : DType::float32; }
};

// Cuts the parameters into matrices.
void cut(Table& table, const std::vector<ElementwiseTensor>& elementwise,
         const std::vector<int64_t>& matrix_rows) {
    NG_CHECK(matrix_rows.size() == elementwise.size(), "matrix_rows must be one per parameter");
    for (size_t i = 0; i < elementwise.size(); ++i) {
        AdafactorTensor tensor{};
        static_cast<ElementwiseTensor&>(tensor) = elementwise[i];
        tensor.matrix_rows = matrix_rows[i];
        NG_CHECK(tensor.matrix_rows > 0 && rows_of(tensor) % tensor.matrix_rows == 0, "matrix_rows[", i,
                 "] must divide the rows of its parameter");
        const Tiles tiles = tiles_of(tensor);
        tensor.first_row = table.rows;
        tensor.first_column = table.columns;
        tensor.first_row_partial = table.row_partials;
        tensor.first_column_partial = table.column_partials;
        table.rows += rows_of(tensor);
        table.columns += tensor.numel / tensor.matrix_rows;
        table.row_partials += rows_of(tensor) * tiles.across;
        table.column_partials += tiles.matrices * tiles.down * tensor.row_length;
        table.tensors.push_back(tensor);
    }
}

// Points every parameter to its factors.
void attach(Table& table, const Tensor& rows, const Tensor& columns, const Tensor& first) {
    const auto check = [&](const Tensor& factors, int64_t count, const char* name) {
        NG_CHECK(same_device(factors, first) && factors.is_contiguous() && factors.numel() == count &&
                     dtype(factors) == table.compute(),
                 name,
                 " must be contiguous and hold one number per row (column), in the type of computation");
    };
    check(rows, table.rows, "rows");
    check(columns, table.columns, "columns");
    const int64_t size = size_of(table.compute());
    for (auto& tensor : table.tensors) {
        tensor.rows = static_cast<const char*>(data(rows)) + tensor.first_row * size;
        tensor.columns = static_cast<const char*>(data(columns)) + tensor.first_column * size;
    }
}

int64_t step_chunks_of(const AdafactorTensor& tensor) { return (tensor.numel + step_chunk - 1) / step_chunk; }
int64_t tile_count(const AdafactorTensor& tensor) { return tiles_of(tensor).count(); }

void number(Table& table, int64_t (*parts)(const AdafactorTensor&)) {
    table.args.chunks = 0;
    for (auto& tensor : table.tensors) tensor.last_chunk = table.args.chunks += parts(tensor);
}

#if NARROWGAUGE_CPU

template <class Kernel>
void run(Kernel kernel, const Table& table) {
    int64_t elements = 1;
    for (const auto& tensor : table.tensors) elements += tensor.numel;
    parallel_for(0, table.args.chunks, std::max<int64_t>(1, table.args.chunks * 32768 / elements),
                 [&](int64_t begin, int64_t end) { kernel(table.args, table.tensors.data(), begin, end); });
}

template <class T>
void add_squares(const Table& table) {
    const T* partial = static_cast<const T*>(table.args.square_partial);
    T* squares = static_cast<T*>(table.args.squares);
    int64_t part = 0;
    for (const auto& tensor : table.tensors) {
        double sum = 0.0;
        for (; part < tensor.last_chunk; ++part) sum += static_cast<double>(partial[part]);
        *squares++ = static_cast<T>(sum);
    }
}

// Rows and columns of one parameter, from those of its tiles.
template <class T>
void add_tiles(const AdafactorArgs& args, const AdafactorTensor& tensor) {
    const Tiles tiles = tiles_of(tensor);
    const T* rows = static_cast<const T*>(args.row_partial) + tensor.first_row_partial;
    const T* columns = static_cast<const T*>(args.column_partial) + tensor.first_column_partial;
    T* row_sums = static_cast<T*>(args.row_sums) + tensor.first_row;
    T* column_sums = static_cast<T*>(args.column_sums) + tensor.first_column;
    for (int64_t row = 0; row < rows_of(tensor); ++row, rows += tiles.across) {
        double sum = 0.0;
        for (int64_t k = 0; k < tiles.across; ++k) sum += static_cast<double>(rows[k]);
        row_sums[row] = static_cast<T>(sum);
    }
    const int64_t size = tensor.row_length;
    for (int64_t matrix = 0; matrix < tiles.matrices;
         ++matrix, columns += tiles.down * size, column_sums += size) {
        for (int64_t j = 0; j < size; ++j) {
            double sum = 0.0;
            for (int64_t k = 0; k < tiles.down; ++k) sum += static_cast<double>(columns[k * size + j]);
            column_sums[j] = static_cast<T>(sum);
        }
    }
}

void run_sums(const Table& table, const Tensor&) {
    run(NG_CPU_POINTER(adafactor_sum_tiles), table);
    const bool wide = table.compute() == DType::float64;
    parallel_for(0, static_cast<int64_t>(table.tensors.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const auto& tensor = table.tensors[static_cast<size_t>(i)];
            wide ? add_tiles<double>(table.args, tensor) : add_tiles<float>(table.args, tensor);
        }
    });
    wide ? add_squares<double>(table) : add_squares<float>(table);
}

void run_norms(const Table& table, const Tensor&) {
    run(NG_CPU_POINTER(adafactor_norm_chunks), table);
    table.compute() == DType::float64 ? add_squares<double>(table) : add_squares<float>(table);
}

void run_step(const Table& table, const Tensor&) {
    if (table.args.found_inf && *table.args.found_inf != 0) return;
    for (const auto& tensor : table.tensors) *tensor.step += 1;
    run(NG_CPU_POINTER(adafactor_step_chunks), table);
}

#else

template <class Launch>
void run(Launch launch, const Table& table, const Tensor& first) {
    const OnDevice device(first);
    const int64_t size = size_of(table.compute());
    int64_t done = 0;
    for_launches<AdafactorLaunch>(table.args, table.tensors, [&](AdafactorLaunch& part, int64_t before) {
        if (part.args.square_partial)
            part.args.square_partial = static_cast<char*>(part.args.square_partial) + before * size;
        if (part.args.squares) part.args.squares = static_cast<char*>(part.args.squares) + done * size;
        done += part.args.count;
        launch(part, device.stream());
    });
}

void run_sums(const Table& table, const Tensor& first) { run(launch_adafactor_sums, table, first); }
void run_norms(const Table& table, const Tensor& first) { run(launch_adafactor_norms, table, first); }
void run_step(const Table& table, const Tensor& first) { run(launch_adafactor_step, table, first); }

#endif

const std::vector<double> no_options;
const std::optional<Tensor> nothing;
const std::vector<Tensor> no_tensors;

std::tuple<Tensor, Tensor, Tensor> adafactor_sums(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& steps,
    const std::vector<int64_t>& row_lengths, const std::vector<int64_t>& matrix_rows,
    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& clip) {
    NG_CHECK(!params.empty(), "params must not be empty");
    const RuleShape shape{0, 0, 0, false, 0, nullptr};
    const ElementwiseLists lists{params, grads,      no_tensors, no_tensors, steps,       nothing,    nothing,
                                 0.0,    no_options, 0,          false,      row_lengths, grad_scale, clip};
    Table table;
    cut(table, collect(shape, lists, table.args), matrix_rows);
    number(table, tile_count);
    const Tensor& first = params[0];
    const DType compute = table.compute();
    Tensor rows = empty({table.rows}, compute, first), columns = empty({table.columns}, compute, first),
           squares = empty({table.args.count}, compute, first);
    const Tensor row_partial = empty({table.row_partials}, compute, first),
                 column_partial = empty({table.column_partials}, compute, first),
                 square_partial = empty({table.args.chunks}, compute, first);
    table.args.row_sums = data(rows);
    table.args.column_sums = data(columns);
    table.args.squares = data(squares);
    table.args.row_partial = data(row_partial);
    table.args.column_partial = data(column_partial);
    table.args.square_partial = data(square_partial);
    run_sums(table, first);
    return {rows, columns, squares};
}

Tensor adafactor_norms(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                       const std::vector<Tensor>& steps, const Tensor& rows, const Tensor& columns,
                       double least, const std::vector<int64_t>& row_lengths,
                       const std::vector<int64_t>& matrix_rows, const std::optional<Tensor>& grad_scale,
                       const std::optional<Tensor>& clip) {
    NG_CHECK(!params.empty(), "params must not be empty");
    const RuleShape shape{0, 0, 0, false, 0, nullptr};
    const ElementwiseLists lists{params, grads,      no_tensors, no_tensors, steps,       nothing,    nothing,
                                 0.0,    no_options, 0,          false,      row_lengths, grad_scale, clip};
    Table table;
    cut(table, collect(shape, lists, table.args), matrix_rows);
    attach(table, rows, columns, params[0]);
    number(table, step_chunks_of);
    table.args.least = least;
    Tensor squares = empty({table.args.count}, table.compute(), params[0]);
    const Tensor square_partial = empty({table.args.chunks}, table.compute(), params[0]);
    table.args.squares = data(squares);
    table.args.square_partial = data(square_partial);
    run_norms(table, params[0]);
    return squares;
}

void adafactor_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                    const std::vector<Tensor>& steps, const std::vector<Tensor>& rests,
                    const std::vector<Tensor>& emas, const std::vector<Tensor>& copies, const Tensor& given,
                    const Tensor& rows, const Tensor& columns, double least, int64_t param_update,
                    bool maximize, bool zero_grad, double ema_decay, const std::vector<int64_t>& row_lengths,
                    const std::vector<int64_t>& matrix_rows, int64_t seed,
                    const std::vector<int64_t>& indices, const std::vector<int64_t>& first_elements,
                    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& clip,
                    const std::optional<Tensor>& found_inf) {
    if (params.empty()) return;
    NG_CHECK(param_update != static_cast<int64_t>(ParamUpdate::split), "param_update split is not offered");
    const RuleShape shape{0, 0, 0, false, 2, nullptr};
    const std::optional<Tensor> numbers(given);
    const ElementwiseLists lists{params, grads,      no_tensors, no_tensors, steps,       numbers,    nothing,
                                 0.0,    no_options, 0,          maximize,   row_lengths, grad_scale, clip};
    const ElementwiseExtras extras{rests,     emas, copies,  nothing,        param_update, zero_grad,
                                   ema_decay, seed, indices, first_elements, found_inf};
    Table table;
    std::vector<ElementwiseTensor> tensors = collect(shape, lists, table.args);
    collect_extras(shape, lists, extras, table.args, tensors);
    cut(table, tensors, matrix_rows);
    attach(table, rows, columns, params[0]);
    number(table, step_chunks_of);
    table.args.least = least;
    run_step(table, params[0]);
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("adafactor_sums", NG_BOX(&adafactor_sums));
    m.impl("adafactor_norms", NG_BOX(&adafactor_norms));
    m.impl("adafactor_", NG_BOX(&adafactor_step));
}

}  // namespace narrowgauge
