// llama.cpp's greedy answers with the probabilities of all tokens: reads {model, prompts, steps} from standard input.
import {readFileSync} from "node:fs";

const {getLlama} = await import(`${process.argv[2]}/node_modules/node-llama-cpp/dist/index.js`);
const {model: modelPath, prompts, steps} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 512, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32" // half precision by default
});
const answers = [];
for (const prompt of prompts) {
    const sequence = context.getSequence();
    const tokens = model.tokenize(prompt, true);
    const generated = [], probabilities = [];
    let next = tokens;
    for (let step = 0; step < steps; step++) {
        const evaluated = await sequence.controlledEvaluate([
            ...next.slice(0, -1), [next.at(-1), {generateNext: {probabilities: true}}]
        ]);
        const found = evaluated.at(-1).next.probabilities;
        const row = Array(found.size);
        for (const [token, probability] of found) row[token] = probability;
        probabilities.push(row);
        next = [row.indexOf(Math.max(...row))];
        generated.push(next[0]);
    }
    answers.push({tokens, generated, probabilities, text: model.detokenize(generated, true)});
    await sequence.dispose();
}
process.stdout.write(JSON.stringify({answers}), () => process.exit(0));
