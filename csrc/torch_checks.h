// What the binding asks of every argument before a kernel sees a pointer. A kernel trusts its
// sizes and tables; so whatever Python hands over is refused here if it could lead outside.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace g2r_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Double:
            return "float64";
        default:
            return "another dtype";
    }
}

// No streams here: they need locales, and in a process with a second copy of the C++ library, as
// some Python packages bring one, they can crash where a message should appear.
inline std::string text_of(const std::string& text) { return text; }

template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
std::string text_of(Number number) {
    if constexpr (std::is_integral_v<Number>) {
        return std::to_string(number);
    } else {
        char text[32];
        std::snprintf(text, sizeof(text), "%g", number);
        return text;
    }
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
    std::string text = "[";
    for (int64_t size : sizes) {
        if (text.size() > 1) text += ", ";
        text += std::to_string(size);
    }
    return text + "]";
}

// The checks of one call of the op `op`; every failure is "op: what; expected ...; got ...".
class Checks {
 public:
    using Shape = std::initializer_list<int64_t>;

    explicit Checks(const char* op) : op_(op) {}

    template <typename Expected, typename Got>
    [[noreturn]] void refuse(const std::string& what, const Expected& expected, const Got& got,
                             int64_t index = -1) const {
        std::string text = std::string("g2r_fast::") + op_ + ": " + what + "; expected " +
                           text_of(expected) + "; got " + text_of(got);
        if (index >= 0) text += "; first at index " + std::to_string(index);
        throw std::runtime_error(text);
    }

    // The element type of the model, as told by one of its tensors.
    ScalarType storage(const Tensor& tensor, const char* name) const {
        const ScalarType type = tensor.scalar_type();
        if (type != ScalarType::Float && type != ScalarType::BFloat16) {
            refuse(std::string(name) + " has a dtype the kernels do not know",
                   "float32 or bfloat16", name_of(type));
        }
        return type;
    }

    int64_t size(const Tensor& tensor, const char* name, int64_t dims, int64_t dim) const {
        if (tensor.dim() != dims) {
            refuse(std::string(name) + " has the wrong number of dimensions", dims, tensor.dim());
        }
        return tensor.size(dim);
    }

    // Dense, on the CPU, of this dtype and shape: the only kind of memory a kernel may be handed.
    void tensor(const Tensor& tensor, const char* name, ScalarType type, Shape shape) const {
        if (!tensor.is_cpu()) {
            refuse(std::string(name) + " is not on the CPU", "a CPU tensor", "another device");
        }
        if (tensor.scalar_type() != type) {
            refuse(std::string(name) + " has the wrong dtype", name_of(type),
                   name_of(tensor.scalar_type()));
        }
        const auto sizes = tensor.sizes();
        bool equal = sizes.size() == shape.size();
        for (std::size_t i = 0; equal && i < shape.size(); ++i) {
            equal = sizes[i] == shape.begin()[i];
        }
        if (!equal) {
            refuse(std::string(name) + " has the wrong shape", shape_text(shape),
                   shape_text(sizes));
        }
        if (!tensor.is_contiguous()) {
            refuse(std::string(name) + " is not contiguous", "a contiguous tensor",
                   "strides " + shape_text(tensor.strides()));
        }
    }

    template <typename T = void>
    const T* in(const Tensor& value, const char* name, ScalarType type, Shape shape) const {
        tensor(value, name, type, shape);
        return static_cast<const T*>(value.const_data_ptr());
    }

    template <typename T = void>
    const T* in(const MaybeTensor& value, const char* name, ScalarType type, Shape shape) const {
        return value ? in<T>(*value, name, type, shape) : nullptr;
    }

    template <typename T = void>
    T* out(const Tensor& value, const char* name, ScalarType type, Shape shape) const {
        tensor(value, name, type, shape);
        return static_cast<T*>(value.mutable_data_ptr());
    }

    template <typename T = void>
    T* out(const MaybeTensor& value, const char* name, ScalarType type, Shape shape) const {
        return value ? out<T>(*value, name, type, shape) : nullptr;
    }

    void needs(const MaybeTensor& value, const char* name, const char* because) const {
        if (!value) refuse(std::string(name) + " is missing", because, "None");
    }

    void multiple(const char* what, int64_t value, int64_t of) const {
        if (value < of || value % of != 0) {
            refuse(std::string(what) + " does not suit the kernels",
                   "a positive multiple of " + std::to_string(of), value);
        }
    }

    void head_dim(int64_t value) const {
        multiple("head_dim", value, 16);
        if (value > 256) refuse("head_dim does not suit the kernels", "at most 256", value);
    }

    void between(const char* name, int64_t value, int64_t low, int64_t high) const {
        if (value < low || value > high) {
            refuse(std::string(name) + " is out of range",
                   std::to_string(low) + " to " + std::to_string(high), value);
        }
    }

    void number(const char* name, double value, double low) const {
        if (!(value >= low && value <= 1e30)) {
            refuse(std::string(name) + " is out of range",
                   "a finite number" + std::string(low == 0 ? ", 0 or greater" : ""), value);
        }
    }

    // Every entry of a map into `rows` rows; -1 stands for none where `low` is -1.
    const int32_t* rows_of(const Tensor& map, const char* name, int64_t count, int64_t low,
                           int64_t rows) const {
        const auto* entries = in<int32_t>(map, name, ScalarType::Int, {count});
        for (int64_t i = 0; i < count; ++i) {
            if (entries[i] < low || entries[i] >= rows) {
                refuse(std::string(name) + " holds a row that does not exist",
                       std::to_string(low) + " <= row < " + std::to_string(rows), entries[i], i);
            }
        }
        return entries;
    }

    // start .. start + count lies within 0 .. limit, whatever the numbers are.
    void span(const char* what, int64_t start, int64_t count, int64_t limit, int64_t index) const {
        if (start < 0 || count < 0 || count > limit || start > limit - count) {
            refuse(std::string(what) + " reach outside", "within 0 to " + std::to_string(limit),
                   std::to_string(count) + " from " + std::to_string(start), index);
        }
    }

 private:
    const char* op_;
};

}  // namespace g2r_torch
