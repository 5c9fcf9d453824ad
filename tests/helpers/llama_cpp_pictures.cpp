// llama.cpp's greedy answers to pictures. On standard input, a line each: tokens of an answer, the prompt, the picture
// as binary PPM; on standard output, a line each: the answer's tokens, then all probabilities of the first one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "llama.h"
#include "mtmd.h"

static std::vector<unsigned char> read_ppm(const std::string & path, int & width, int & height) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    int largest = 0;
    file >> magic >> width >> height >> largest;
    file.get();
    std::vector<unsigned char> pixels(3 * width * height);
    file.read(reinterpret_cast<char *>(pixels.data()), pixels.size());
    return pixels;
}

static void check(bool done, const char * what) {
    if (!done) {
        fprintf(stderr, "failed: %s\n", what);
        exit(1);
    }
}

// tokens or embeddings of `count` positions after `past`; logits of the last one
static void decode(llama_context * context, llama_token * tokens, float * embeddings, int count, int past) {
    llama_batch batch = llama_batch_init(count, 0, 1);
    for (int i = 0; i < count; i++) {
        if (tokens) batch.token[i] = tokens[i];
        batch.pos[i] = past + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = i == count - 1;
    }
    batch.n_tokens = count;
    llama_token * owned = batch.token;
    if (embeddings) {
        batch.token = nullptr;
        batch.embd = embeddings;
    }
    check(llama_decode(context, batch) == 0, "llama_decode");
    batch.token = owned;
    batch.embd = nullptr;
    llama_batch_free(batch);
}

int main(int argc, char ** argv) {
    check(argc == 3, "usage: pictures model.gguf mmproj.gguf");
    ggml_backend_load_all_from_path(PLUGINS);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    mtmd_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    check(model, "the language model");
    mtmd_context_params vision_params = mtmd_context_params_default();
    vision_params.use_gpu = false;
    vision_params.n_threads = 1;
    vision_params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    mtmd_context * vision = mtmd_init_from_file(argv[2], model, vision_params);
    check(vision, "the encoder");
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int size = llama_vocab_n_tokens(vocab);

    std::string steps, prompt, picture;
    while (std::getline(std::cin, steps) && std::getline(std::cin, prompt) && std::getline(std::cin, picture)) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = 512;
        params.n_threads = params.n_threads_batch = 1;
        params.type_k = params.type_v = GGML_TYPE_F32; // half precision by default
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        llama_context * context = llama_init_from_model(model, params);
        int width, height;
        std::vector<unsigned char> pixels = read_ppm(picture, width, height);
        mtmd_bitmap * bitmap = mtmd_bitmap_init(width, height, pixels.data());
        mtmd_input_chunks * chunks = mtmd_input_chunks_init();
        mtmd_input_text text{};
        text.text = prompt.c_str();
        text.text_len = prompt.size();
        text.parse_special = true;
        const mtmd_bitmap * bitmaps[] = {bitmap};
        check(mtmd_tokenize(vision, chunks, &text, bitmaps, 1) == 0, "mtmd_tokenize");
        int past = 0;
        for (size_t i = 0; i < mtmd_input_chunks_size(chunks); i++) {
            const mtmd_input_chunk * chunk = mtmd_input_chunks_get(chunks, i);
            size_t count = mtmd_input_chunk_get_n_tokens(chunk);
            if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT) {
                const llama_token * tokens = mtmd_input_chunk_get_tokens_text(chunk, &count);
                decode(context, const_cast<llama_token *>(tokens), nullptr, count, past);
            } else {
                check(mtmd_encode_chunk(vision, chunk) == 0, "mtmd_encode_chunk");
                decode(context, nullptr, mtmd_get_output_embd(vision), count, past);
            }
            past += count;
        }
        std::vector<double> first;
        for (int step = 0; step < std::stoi(steps); step++) {
            const float * logits = llama_get_logits_ith(context, -1);
            llama_token best = std::max_element(logits, logits + size) - logits;
            if (first.empty()) {
                double sum = 0;
                for (int i = 0; i < size; i++) sum += std::exp(double(logits[i]) - logits[best]);
                for (int i = 0; i < size; i++) first.push_back(std::exp(double(logits[i]) - logits[best]) / sum);
            }
            printf("%d ", best);
            if (llama_vocab_is_eog(vocab, best)) break;
            decode(context, &best, nullptr, 1, past++);
        }
        printf("|");
        for (double probability : first) printf(" %.9g", probability);
        printf("\n");
        mtmd_input_chunks_free(chunks);
        mtmd_bitmap_free(bitmap);
        llama_free(context);
    }
    mtmd_free(vision);
    llama_model_free(model);
    return 0;
}
