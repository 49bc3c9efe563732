"""C++ around the masked linear's products, column masks, sums, dropout and columns in another order, and compaction."""

from mutants.mutant import Table

COLUMNS = "csrc/cpu/columns_impl.h"
WHOLE = "csrc/cpu/columns.cpp"
SUMS = "csrc/cpu/column_sums.h"
OBSERVED = "tests/atp_kernels/test_mask_gradient.py -k sums_are"
COMPACT = "csrc/cpu/compact.cpp"
TAKE = "csrc/cpu/take.cpp"
INDICES = "csrc/cpu/indices.h"

LINEAR = "tests/atp_kernels/test_native_linear.py -k 'masks_are or column_sums or dropout_is or threads'"
GATHER = "tests/atp_kernels/test_native.py -k compact"
TAKEN = "tests/atp_kernels/test_native_columns.py"

TABLE: Table = {
    (COLUMNS, LINEAR): (
        ("store8(out + col, load8(x + col) * load8(mask + col));", "store8(out + col, load8(x + col));"),
        ("load_tail(x + col, count) * load_tail(mask + col, count), count)", "load_tail(x + col, count), count)"),
        ("float* sums) {\n  std::fill(sums, sums + cols, 0.0f);\n  for (int64_t row = 0; row < rows; ++row, left",
         "float* sums) {\n  std::fill(sums, sums + cols, 1.0f);\n  for (int64_t row = 0; row < rows; ++row, left"),
        ("load8(sums + col) + load8(left + col) * load8(right + col)", "load8(left + col) * load8(right + col)"),
        ("load8(left + col) * load8(right + col)", "load8(left + col)"),
        ("product = load_tail(left + col, count) * load_tail(right + col, count);",
         "product = load_tail(left + col, count);"),
        ("load_tail(sums + col, count) + product, count)", "product, count)"),
        ("float* sums) {\n  std::fill(sums, sums + cols, 0.0f);\n  for (int64_t row = 0; row < rows; ++row, grad",
         "float* sums) {\n  std::fill(sums, sums + cols, 1.0f);\n  for (int64_t row = 0; row < rows; ++row, grad"),
        ("store8(out + col, value * load8(mask + col));", "store8(out + col, value);"),
        ("load8(sums + col) + value * load8(total + col)", "value * load8(total + col)"),
        ("value * load8(total + col)", "load8(total + col)"),
        ("value * load_tail(mask + col, count), count)", "value, count)"),
        ("load_tail(sums + col, count) + value * load_tail(total + col, count)",
         "value * load_tail(total + col, count)"),
        ("value * load_tail(total + col, count)", "load_tail(total + col, count)"),
        ("kPhiloxRounds = 7", "kPhiloxRounds = 6"),
        ("c1[i] = first + i;", "c1[i] = i;"),
        ("^ c1[i] ^ key_low", "^ c1[i]"),
        ("^ c3[i] ^ key_high", "^ c3[i]"),
        ("key_low += 0x9E3779B9u;", ""),
        ("key_high += 0xBB67AE85u;", ""),
        ("start < cols; start += 4 * kQuads", "start < 1; start += 4 * kQuads"),
        ("static_cast<uint32_t>(start / 4)", "0"),
        ("kept8(words + col - start, drop.threshold);\n      store8", "kept8(words, drop.threshold);\n      store8"),
        ("(int8x32)(load8(x + col) * drop.scale) & kept", "(int8x32)load8(x + col) & kept"),
        ("(int8x32)(load8(x + col) * drop.scale) & kept", "(int8x32)(load8(x + col) * drop.scale)"),
        ("kept8(words + col - start, drop.threshold);\n      const", "kept8(words, drop.threshold);\n      const"),
        ("load_tail(x + col, stop - col) * drop.scale;", "load_tail(x + col, stop - col);"),
        ("(float8)((int8x32)value & kept)", "value"),
    ),
    (SUMS, LINEAR): (
        ("(rows + kBlockRows - 1) / kBlockRows", "rows / kBlockRows"),
        ("std::min(kBlockRows, rows - first)", "std::min<int64_t>(1, rows - first)"),
        ("parts.get() + block * cols);", "parts.get());"),
        ("std::vector<double> totals", "std::vector<float> totals"),
        ("totals[col] += parts", "totals[col] = parts"),
    ),
    (WHOLE, OBSERVED): (
        ("add_dots<decltype(tag)>(left, right, i * each.rows,", "add_dots<decltype(tag)>(left, right, 0,"),
        ("sums_of(sums) + i * sums.stride(0));", "sums_of(sums));"),
        ("static_cast<const T*>(right.const_data_ptr()) + start * size.cols;",
         "static_cast<const T*>(right.const_data_ptr());"),
    ),
    (WHOLE, LINEAR): (
        ("int64_t at = first * size.cols;\n      columns_for<T>(loops()).mask_rows(",
         "int64_t at = 0;\n      columns_for<T>(loops()).mask_rows("),
        ("int64_t at = first * size.cols;\n    columns_for<T>(loops()).dot_rows(",
         "int64_t at = 0;\n    columns_for<T>(loops()).dot_rows("),
        ("int64_t at = first * size.cols;\n      columns_for<T>(loops()).mask_and_dot_rows(",
         "int64_t at = 0;\n      columns_for<T>(loops()).mask_and_dot_rows("),
        ("static_cast<float>(scale), static", "1.0f, static"),
        ("static_cast<uint32_t>(key >> 32)", "0"),
        ("static_cast<uint32_t>(row), drop", "static_cast<uint32_t>(row - first), drop"),
    ),
    (TAKE, TAKEN): (
        ("values.dim() == 2 && values.stride(1) == 1", "values.dim() == 2"),
        ("values.dim() == 2 && values.stride(1) == 1", "values.stride(1) == 1"),
        ("out.size(0) == rows && out", "out"),
        ("out.size(1) == count && out", "out"),
        ("&& out.scalar_type() == values.scalar_type(),", ","),
        ("count, values.size(1), \"index\")", "0, values.size(1), \"index\")"),
        ("count, values.size(1), \"index\")", "count, count, \"index\")"),
        ("from_stride = values.stride(0)", "from_stride = values.size(1)"),
        ("to_stride = out.stride(0)", "to_stride = count"),
        ("take(from + row * from_stride,", "take(from + (row - first) * from_stride,"),
        ("count, to + row * to_stride)", "count, to + (row - first) * to_stride)"),
        ("place.numel() == count && width", "width"),
        ("width >= 0 && width <= count", "width <= count"),
        ("width >= 0 && width <= count", "width >= 0"),
        ("count, width, \"place\")", "count, count, \"place\")"),
        ("stride = values.stride(0);", "stride = count;"),
        ("std::copy_n(all + row * stride, width, head.begin());", ""),
        ("take(head.data(), order.data(),", "take(all + row * stride, order.data(),"),
    ),
    (INDICES, TAKEN): (
        ("index[i] >= 0 && index[i] < size", "index[i] < size"),
        ("index[i] >= 0 && index[i] < size", "index[i] >= 0 && index[i] <= size"),
        ("out[i] = row[index[i]];", "out[i] = row[i];"),
        ("check(false, op,", "check(true, op,"),
    ),
    (COMPACT, GATHER): (
        ("plan.rows, weight.size(0), \"rows\"", "plan.rows, weight.size(1), \"rows\""),
        ("plan.cols, weight.size(1), \"cols\"", "plan.cols, weight.size(0), \"cols\""),
        ("plan.row_index ? plan.row_index[row] : row", "row"),
        ("take(in, plan.col_index, kept, out);", "std::copy_n(in, kept, out);"),
        ("std::fill(out + kept, out + plan.out_cols, T{0});", "std::fill(out + kept, out + plan.out_cols, T{1});"),
    ),
    ("csrc/gather.h", GATHER): (
        ("(size / pad_to + (size % pad_to != 0)) * pad_to", "(size / pad_to + 1) * pad_to"),
        ("plan.out_rows = rows ? padded(plan.rows) : plan.rows;", "plan.out_rows = plan.rows;"),
        ("plan.out_cols = cols ? padded(plan.cols) : plan.cols;", "plan.out_cols = padded(plan.cols);"),
    ),
}  # fmt: skip
