// Greedy tokens that transformers.js makes with an exported captioner: node caption.mjs FOLDER DTYPE PIXELS.json
import { readFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { AutoModelForVision2Seq, Tensor, env } from '@huggingface/transformers';

const [folder, dtype, file] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder) + '/';
const { data, dims, max_new_tokens } = JSON.parse(readFileSync(file));
const model = await AutoModelForVision2Seq.from_pretrained(basename(folder), { dtype });
const pixel_values = new Tensor('float32', Float32Array.from(data), dims);
const ids = await model.generate({ pixel_values, max_new_tokens, num_beams: 1, do_sample: false });
console.log(JSON.stringify(ids.tolist().map((row) => row.map(Number))));
