"""Ask a released adapter: python infer.py REF [BASE]"""

import sys

from generate import SYSTEM

from adapterhub import load_adapter

ref, *base = sys.argv[1:]
model, tokenizer = load_adapter(ref, base=base[0] if base else None)
order = "Hi! Order for Ines Novak: two kilos of pears and a dozen eggs... no, six trays of eggs, on Friday."
messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": order}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs.to(model.device), max_new_tokens=128, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
