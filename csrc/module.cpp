// The Python module atp_kernels._C: importing it defines the operators, and build_info() says what was built.

#include "cpu/loops.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#ifndef ATP_CUDA_ARCHS
#define ATP_CUDA_ARCHS ""
#endif

// `stream` is the raw CUDA stream of the call, 0 on a CPU: handed in, the binary needs no CUDA library of torch.
STABLE_TORCH_LIBRARY(atp_kernels_native, m) {
  m.def(
      "group_lasso_forward(Tensor[] factors, int[] axes, Tensor index, Tensor order, Tensor starts, Tensor removed,"
      " float eps, int stream=0) -> (Tensor, Tensor)");
  m.def(
      "group_lasso_backward(Tensor[] factors, int[] axes, Tensor index, Tensor removed, Tensor norms, Tensor grad_out,"
      " int stream=0) -> Tensor[]");
  m.def(
      "group_lasso_grad_(Tensor[] factors, Tensor(a!)[] grads, int[] axes, Tensor index, Tensor order, Tensor starts,"
      " int[] sides, Tensor removed, Tensor weight, float eps, bool runs, int stream=0) -> Tensor");
  m.def(
      "group_prox_(Tensor(a!)[] factors, int[] axes, Tensor index, Tensor order, Tensor starts, Tensor removed,"
      " Tensor threshold, int stream=0) -> ()");
  m.def(
      "separate_lasso_forward(Tensor[] factors, int[] axes, Tensor removed, float eps, bool with_direction)"
      " -> (Tensor, Tensor)");
  m.def("separate_lasso_backward(Tensor(a!) direction, int[] sides, Tensor grad_out, bool in_place) -> Tensor[]");
  m.def("masked(Tensor values, Tensor mask) -> Tensor");
  m.def("mask_(Tensor(a!) values, Tensor mask) -> ()");
  m.def("column_dot(Tensor left, Tensor right) -> Tensor");
  m.def("add_sample_dots(Tensor left, Tensor right, Tensor(a!) sums) -> ()");
  m.def("mask_and_dot(Tensor grad, Tensor total, Tensor mask) -> (Tensor, Tensor)");
  m.def("take_columns(Tensor values, Tensor index, Tensor(a!) out) -> ()");
  m.def("spread_columns_(Tensor(a!) values, int width, Tensor place) -> ()");
  m.def("dropped(Tensor values, int threshold, float scale, int seed) -> Tensor");
  m.def("swiglu_forward(Tensor gate, Tensor up, bool gelu=False) -> Tensor");
  m.def(
      "swiglu_backward(Tensor d_h, Tensor gate, Tensor up, Tensor(a!) d_gate, Tensor(b!) d_up, Tensor(c!)? sums=None,"
      " bool gelu=False) -> ()");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets) -> Tensor");
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps, bool narrow) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor d_y, Tensor x, Tensor weight, Tensor scales) -> Tensor");
  m.def("merged_weight(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor");
  m.def(
      "packed_forward(Tensor x, Tensor(a!) weight, Tensor(b!) down, Tensor? bias, Tensor[] factors, float scaling)"
      " -> (Tensor, Tensor)");
  m.def(
      "packed_backward(Tensor grad, Tensor wide, Tensor weight, Tensor down, Tensor[] factors, float scaling,"
      " bool need_x) -> Tensor[]");
  m.def(
      "packed_mlp_forward(Tensor x, Tensor(a!) w1, Tensor(b!) d1, Tensor? b1, Tensor(c!) w2, Tensor(d!) d2, Tensor? b2,"
      " Tensor[] factors, float s1, float s2, bool gelu=False, Tensor? norm=None, float eps=0.0)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "packed_mlp_backward(Tensor grad, Tensor wide, Tensor both, Tensor s, Tensor w1, Tensor d1, Tensor w2, Tensor d2,"
      " Tensor[] factors, float s1, float s2, bool gelu, bool need_x, Tensor(a!)? sums, Tensor? x=None,"
      " Tensor? norm=None, Tensor? scales=None) -> Tensor[]");
  m.def(
      "packed_attention_forward(Tensor x, Tensor(a!) w1, Tensor(b!) d1, Tensor? b1, Tensor(c!) w2, Tensor(d!) d2,"
      " Tensor? b2, Tensor[] factors, float s1, float s2, Tensor cos, Tensor sin, Tensor? mask, float scale, int batch,"
      " Tensor? norm=None, float eps=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor wide, Tensor qkv, Tensor p, Tensor hidden, Tensor w1, Tensor d1,"
      " Tensor w2, Tensor d2, Tensor[] factors, float s1, float s2, Tensor cos, Tensor sin, float scale, int batch,"
      " bool need_x, Tensor(a!)? sums, Tensor? x=None, Tensor? norm=None, Tensor? scales=None) -> Tensor[]");
  m.def("compact(Tensor weight, Tensor? rows, Tensor? cols, int pad_to, int stream=0) -> Tensor");
}

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::string stable_abi_target() {
  return std::to_string((TORCH_TARGET_VERSION >> 56) & 0xff) + "." + std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff);
}

pybind11::dict build_info() {
  std::vector<std::string> isas;
  for (const auto* set : atp::cpu::compiled_loops()) isas.emplace_back(set->isa);
  pybind11::list archs;
  for (const auto& arch : pybind11::str(ATP_CUDA_ARCHS).attr("split")()) archs.append(arch);

  pybind11::dict info;
  info["compiler"] = compiler();
  info["isa_compiled"] = isas;
  info["isa"] = atp::cpu::loops().isa;
  info["cuda_archs"] = archs;
  info["stable_abi_target"] = stable_abi_target();
  info["torch_built_with"] = TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of atp_kernels, registered as torch.ops.atp_kernels_native.";
  m.def("build_info", &build_info, "What this binary was built with and which instruction set it picked.");
  atp::cpu::loops();  // a bad ATP_KERNELS_ISA fails the import instead of the first call
}
