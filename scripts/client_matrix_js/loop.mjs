// Two turns of a tool loop through the Vercel AI SDK; prints what the second turn says.
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const [mode, baseURL, name, apiKey] = process.argv.slice(2);
const model =
  mode === 'chat' ? createOpenAICompatible({ name: 'jaxllm', baseURL, apiKey })(name) : createOpenAI({ baseURL, apiKey })(name);
let called = 0;
const weather = tool({
  description: 'The weather in a city.',
  inputSchema: z.object({ city: z.enum(['Paris', 'Rome']) }),
  execute: async () => {
    called += 1;
    return '12 degrees and rain';
  },
});
const options = {
  model,
  tools: { get_weather: weather },
  prompt: 'What is the weather in Paris? Use the function.',
  maxOutputTokens: 48,
  maxRetries: 0,
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'auto' }),
};
let text = '';
if (mode === 'chat') {
  text = (await generateText(options)).text;
} else {
  const result = streamText({ ...options, onError: ({ error }) => { throw error; } });
  for await (const piece of result.textStream) text += piece;
}
if (called !== 1) throw new Error(`the function was called ${called} times`);
console.log(text);
