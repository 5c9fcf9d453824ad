// Greedy answers of an exported folder in transformers.js, with no line about the model:
//   node transformers_js.mjs NODE_MODULES FOLDER ROWS.json
// ROWS.json has `{rows: [{image, question}], max_new_tokens, dtype}`; standard output gets a list of token ids per row.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [modules, folder, file] = process.argv.slice(2);
const require = createRequire(path.join(modules, "index.js"));
const library = await import(pathToFileURL(require.resolve("@huggingface/transformers")));
const { AutoModelForImageTextToText, AutoProcessor, RawImage, env } = library.default ?? library;
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));

const { rows, max_new_tokens, dtype } = JSON.parse(readFileSync(file, "utf8"));
const name = path.basename(folder);
const processor = await AutoProcessor.from_pretrained(name);
const options = { session_options: { intraOpNumThreads: 1 }, ...(dtype && { dtype }) };
const model = await AutoModelForImageTextToText.from_pretrained(name, options);

const answers = [];
for (const { image, question } of rows) {
  const content = [{ type: "image" }, { type: "text", text: question }];
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const inputs = await processor(await RawImage.read(image), prompt, { add_special_tokens: false });
  const tokens = await model.generate({ ...inputs, max_new_tokens, do_sample: false });
  answers.push(tokens.slice(null, [inputs.input_ids.dims.at(-1), null]).tolist()[0].map(Number));
}
console.log(JSON.stringify(answers));
