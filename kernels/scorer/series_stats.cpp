// Python bindings of series_stats.h. Sizes are checked here, before anything is read; the GIL is
// released while windows are read.
#include "series_stats.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

using FloatArray = py::array_t<float, py::array::c_style>;

constexpr const char* NAMES[] = {"portable", "avx2", "avx512"};

series::Isa isa_of(const std::string& name) {
  if (name.empty()) return series::best_isa();
  for (int i = 0; i < 3; ++i) {
    if (name != NAMES[i]) continue;
    const auto isa = static_cast<series::Isa>(i);
    if (series::supported(isa)) return isa;
    throw py::value_error("this processor has no " + name);
  }
  throw py::value_error("unknown instruction set " + name);
}

struct Shape {
  std::size_t count, length, channels;
};

Shape shape_of(const FloatArray& windows) {
  if (windows.ndim() != 3 || windows.shape(1) < 1 || windows.shape(2) < 1) {
    throw py::value_error("windows must have shape (N, T, C) with T, C >= 1");
  }
  return {static_cast<std::size_t>(windows.shape(0)), static_cast<std::size_t>(windows.shape(1)),
          static_cast<std::size_t>(windows.shape(2))};
}

py::array_t<float> statistics(const FloatArray& windows, const std::string& isa_name) {
  const Shape shape = shape_of(windows);
  const series::Isa isa = isa_of(isa_name);
  py::array_t<float> result({windows.shape(0), windows.shape(2),
                             static_cast<py::ssize_t>(series::STATISTICS)});
  const float* data = windows.data();
  float* out = result.mutable_data();
  {
    py::gil_scoped_release released;
    series::Scratch scratch(shape.length);
    series::statistics(data, shape.count, shape.length, shape.channels, isa, scratch, out);
  }
  return result;
}

// (rows, columns) float32 as float64, each row followed by zeros up to `padded` columns.
std::vector<double> widened(const FloatArray& array, std::size_t rows, std::size_t columns,
                            std::size_t padded, const char* name) {
  if (static_cast<std::size_t>(array.size()) != rows * columns) {
    throw py::value_error(std::string(name) + " must hold " + std::to_string(rows * columns) +
                          " values");
  }
  std::vector<double> out(rows * padded);
  for (std::size_t row = 0; row < rows; ++row) {
    std::copy_n(array.data() + row * columns, columns, out.data() + row * padded);
  }
  return out;
}

series::Head make_head(const FloatArray& center, const FloatArray& scale, const FloatArray& skip,
                       const FloatArray& kernel, const FloatArray& hidden_bias,
                       const FloatArray& output, double bias) {
  constexpr std::size_t step = series::Head::COLUMNS;
  const auto features = static_cast<std::size_t>(center.size());
  const auto hidden = static_cast<std::size_t>(hidden_bias.size());
  const std::size_t padded = (hidden + step - 1) / step * step;
  series::Head head;
  head.center = widened(center, 1, features, features, "center");
  head.scale = widened(scale, 1, features, features, "scale");
  head.skip = widened(skip, 1, features, features, "skip");
  head.kernel = widened(kernel, features, hidden, padded, "kernel");
  head.hidden_bias = widened(hidden_bias, 1, hidden, padded, "hidden_bias");
  head.output = widened(output, 1, hidden, padded, "output");
  // Adding zero turns -0 into 0, as in the definition.
  head.bias = bias + 0.0;
  return head;
}

py::array_t<float> score(const series::Head& head, const FloatArray& windows,
                         const std::string& isa_name) {
  const Shape shape = shape_of(windows);
  const series::Isa isa = isa_of(isa_name);
  if (head.features() != shape.channels * series::STATISTICS) {
    throw py::value_error("the head must have channels x statistics features");
  }
  py::array_t<float> result(windows.shape(0));
  const float* data = windows.data();
  float* out = result.mutable_data();
  {
    py::gil_scoped_release released;
    series::scores(data, shape.count, shape.length, shape.channels, head, isa, out);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_series_stats, module) {
  module.doc() = "Statistics and scores of time series windows; see series_stats.h.";
  module.attr("STATISTICS") = series::STATISTICS;
  module.def("isas", [] {
    py::list names;
    for (int i = 0; i < 3; ++i) {
      if (series::supported(static_cast<series::Isa>(i))) names.append(NAMES[i]);
    }
    return names;
  });
  module.def("statistics", &statistics, py::arg("windows").noconvert(), py::arg("isa") = "");
  py::class_<series::Head>(module, "Head", py::module_local())
      .def(py::init(&make_head), py::arg("center").noconvert(), py::arg("scale").noconvert(),
           py::arg("skip").noconvert(), py::arg("kernel").noconvert(),
           py::arg("hidden_bias").noconvert(), py::arg("output").noconvert(), py::arg("bias"))
      .def("score", &score, py::arg("windows").noconvert(), py::arg("isa") = "");
}
