// Draws a plan's sample: ./loop step_b2_float16.engine plan_10-KEY LABEL GUIDANCE > x_0.f32 (GUIDANCE may be left out)
// c++ -std=c++17 -O2 loop.cpp -o loop -I/usr/local/cuda/include -L/usr/local/cuda/lib64 -lnvinfer -lcudart
#include <NvInfer.h>
#include <algorithm>
#include <cstdio>
#include <cuda_runtime_api.h>
#include <fstream>
#include <map>
#include <string>
#include <vector>
struct Tensor { size_t row; std::vector<char> table; char* data; };  // row: bytes of a sample; data: a row for each.
struct Log : nvinfer1::ILogger { void log(Severity, char const* t) noexcept override { fprintf(stderr, "%s\n", t); } };
void check(bool good, std::string const& what) { if (!good) fprintf(stderr, "failed: %s\n", what.c_str()), exit(1); }
std::vector<char> load(std::string const& path, bool array = true) {  // Of an .npy file what follows its header.
    std::vector<char> data{std::istreambuf_iterator<char>(std::ifstream(path, std::ios::binary).rdbuf()), {}};
    check(data.size() > 10, "reading " + path);
    return {data.begin() + (array ? 10 + (unsigned char)data[8] + 256 * (unsigned char)data[9] : 0), data.end()};
}
int main(int count, char** words) {
    check(count > 3, "arguments: ENGINE PLAN LABEL [GUIDANCE]");
    std::string const plan = std::string(words[2]) + "/";
    auto file = load(words[1], false), rows = load(plan + "coefficients.npy"), start = load(plan + "x_T.npy");
    auto noise = load(plan + "noise.npy");
    auto* engine = nvinfer1::createInferRuntime(*new Log)->deserializeCudaEngine(file.data(), file.size());
    check(engine, words[1]);
    auto* context = engine->createExecutionContext();
    size_t const guided = count > 4, size = engine->getTensorShape("sample").d[0], samples = guided ? size / 2 : size;
    size_t const stages = rows.size() / 128, one = start.size() / 4, drawn = noise.size() / 4 / stages;
    std::map<std::string, Tensor> tensors;
    for (int index = 0; index < engine->getNbIOTensors(); ++index) {
        char const* n = engine->getIOTensorName(index);
        Tensor& t = tensors[n] = {engine->getTensorDataType(n) == nvinfer1::DataType::kINT64 ? 8u : 4u, {}, nullptr};
        for (int d = 1; d < engine->getTensorShape(n).nbDims; ++d) t.row *= engine->getTensorShape(n).d[d];
        if (n != std::string("sample") && n != std::string("out_sample")) t.table = load(plan + "inputs/" + n + ".npy");
        check(!cudaMallocManaged((void**)&t.data, size * t.row) && context->setTensorAddress(n, t.data), n);
    }
    float *x = (float*)tensors["sample"].data, *out = (float*)tensors["out_sample"].data, *z = (float*)noise.data();
    for (size_t i = 0; i < size * one; ++i) x[i] = ((float*)start.data())[i % one];
    std::vector<std::vector<float>> h(3, std::vector<float>(samples * one));  // The solver's history.
    for (size_t e = 0, wide = tensors["out_sample"].row / 4; e < stages; ++e) {
        for (auto& [name, t] : tensors)
            for (size_t s = 0, all = t.table.size() / stages / t.row; all && s < size; ++s) {
                size_t const row = all == 1 ? 0 : s < samples ? atoi(words[3]) : all - 1;
                std::copy_n(&t.table.at((e * all + row) * t.row), t.row, &t.data[s * t.row]);
            }
        check(context->enqueueV3(nullptr) && !cudaDeviceSynchronize(), "an evaluation");
        float const* c = (float*)rows.data() + 32 * e;  // Its columns: skipstep.kernels.layout.
        for (size_t i = 0, at = 0; i < samples * one; ++i, at = i / one * wide + i % one) {
            float const u = out[at + guided * samples * wide], o = u + (guided ? atof(words[4]) : 0) * (out[at] - u);
            float x0 = c[0] * x[i] + c[1] * o, eps = c[2] * x[i] + c[3] * o;
            if (c[4] != 0) x0 = std::clamp(x0, -c[4], c[4]);
            if (c[5] != 0 || c[6] != 0) eps = c[5] * x[i] + c[6] * x0;
            float after = c[7] * x0 + c[8] * eps + c[9] * x[i] + c[16] * z[e * drawn + i % drawn];
            after += c[11] * h[0][i] + c[10] * h[1][i] + c[19] * h[2][i];
            if (c[31] > 0) h[c[31] - 1][i] = c[12] * x[i] + c[13] * x0 + c[14] * eps + c[15] * h[c[31] - 1][i];
            x[i] = x[i + guided * samples * one] = after;
        }
    }
    fwrite(x, 4, samples * one, stdout);
}
