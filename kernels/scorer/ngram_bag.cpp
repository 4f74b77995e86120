// Python's handle on ngram_core.h: a text scorer whose table lies ready for the loops.
//
//   NgramScorer(table, ..., isa)        copies the table once
//   .score(windows (N, T) int32, pad)   (N,) float32, without the interpreter lock
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "ngram_core.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ids = py::array_t<std::int32_t, py::array::c_style>;

ngram::Isa find_isa(const std::string& name) {
  std::string known;
  for (const ngram::Isa& isa : ngram::available_isas()) {
    if (name.empty() || name == isa.name) return isa;
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw py::value_error("instruction set '" + name + "' is not one of " + known);
}

void check_shape(const py::array& array, std::initializer_list<py::ssize_t> shape,
                 const char* name) {
  bool equal = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t axis = 0;
  for (const py::ssize_t size : shape) equal = equal && array.shape(axis++) == size;
  if (!equal) throw py::value_error(std::string(name) + " has the wrong shape");
}

class NgramScorer {
 public:
  NgramScorer(const py::array& table, std::int64_t vocab_size, std::uint32_t hash_seed, int bits,
              int orders, const Floats& scale, const Floats& skip,
              const std::optional<Floats>& hidden_kernel, const std::optional<Floats>& hidden_bias,
              const std::optional<Floats>& output_kernel, double bias, const std::string& isa)
      : isa_(find_isa(isa)) {
    if (table.ndim() != 2 || !(table.flags() & py::array::c_style)) {
      throw py::value_error("table must be a contiguous (2**bits, D) array");
    }
    if (bits < 1 || bits > ngram::MAX_BITS) throw py::value_error("bits must lie in [1, 24]");
    const py::ssize_t width = table.shape(1);
    check_shape(table, {py::ssize_t{1} << bits, width}, "table");
    check_shape(scale, {width}, "scale");
    check_shape(skip, {width}, "skip");
    const bool deep = hidden_kernel && hidden_bias && output_kernel;
    const py::ssize_t hidden = deep ? hidden_bias->size() : 0;
    if (deep) {
      check_shape(*hidden_kernel, {width, hidden}, "hidden_kernel");
      check_shape(*hidden_bias, {hidden}, "hidden_bias");
      check_shape(*output_kernel, {hidden}, "output_kernel");
    }
    const ngram::Description description{vocab_size,
                                         hash_seed,
                                         bits,
                                         orders,
                                         dtype_of(table),
                                         static_cast<std::size_t>(width),
                                         table.data(),
                                         scale.data(),
                                         skip.data(),
                                         static_cast<std::size_t>(hidden),
                                         deep ? hidden_kernel->data() : nullptr,
                                         deep ? hidden_bias->data() : nullptr,
                                         deep ? output_kernel->data() : nullptr,
                                         bias};
    model_ = std::make_unique<ngram::Model>(description);
  }

  py::array_t<float> score(const Ids& windows, std::optional<std::int32_t> pad_id) const {
    if (windows.ndim() != 2 || windows.shape(1) < 1) {
      throw py::value_error("windows must have shape (N, T) with T >= 1");
    }
    const auto count = static_cast<std::size_t>(windows.shape(0));
    const auto length = static_cast<std::size_t>(windows.shape(1));
    if (length > ngram::MAX_LENGTH) throw py::value_error("windows are too long");
    const ngram::Padding padding{pad_id.has_value(), pad_id.value_or(0)};
    py::array_t<float> result(windows.shape(0));
    const std::int32_t* ids = windows.data();
    float* out = result.mutable_data();
    std::size_t done = 0;
    {
      py::gil_scoped_release released;
      done = isa_.score(*model_, padding, ids, count, length, out);
    }
    if (done != count) {
      const auto position = ngram::bad_position(*model_, padding, ids, done, length);
      throw py::index_error("id out of range at position " + std::to_string(position));
    }
    return result;
  }

  std::string isa() const { return isa_.name; }

 private:
  static ngram::Dtype dtype_of(const py::array& table) {
    const char kind = table.dtype().kind();
    const py::ssize_t size = table.itemsize();
    if (kind == 'i' && size == 1) return ngram::Dtype::int8;
    if (kind == 'f' && size == 2) return ngram::Dtype::float16;
    if (kind == 'f' && size == 4) return ngram::Dtype::float32;
    throw py::type_error("table must be int8, float16 or float32");
  }

  ngram::Isa isa_;
  std::unique_ptr<ngram::Model> model_;
};

}  // namespace

PYBIND11_MODULE(_ngram_bag, module) {
  module.doc() = "Text scorer over hashed n-grams; see ngram_core.h.";
  module.def("available_isas", [] {
    std::vector<std::string> names;
    for (const ngram::Isa& isa : ngram::available_isas()) names.emplace_back(isa.name);
    return names;
  });
  py::class_<NgramScorer>(module, "NgramScorer", py::module_local())
      .def(py::init<const py::array&, std::int64_t, std::uint32_t, int, int, const Floats&,
                    const Floats&, const std::optional<Floats>&, const std::optional<Floats>&,
                    const std::optional<Floats>&, double, const std::string&>(),
           py::arg("table").noconvert(), py::arg("vocab_size"), py::arg("hash_seed"),
           py::arg("bits"), py::arg("orders"), py::arg("scale").noconvert(),
           py::arg("skip").noconvert(), py::arg("hidden_kernel").noconvert(),
           py::arg("hidden_bias").noconvert(), py::arg("output_kernel").noconvert(),
           py::arg("bias"), py::arg("isa"))
      .def("score", &NgramScorer::score, py::arg("windows").noconvert(), py::arg("pad_id"))
      .def_property_readonly("isa", &NgramScorer::isa);
}
