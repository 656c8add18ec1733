"""Tokenizes texts with llama.cpp. Argument: the GGUF file. Reads a JSON list of texts from standard input, prints a list of id lists."""

import json
import sys

import llama_cpp

model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
tokens = [model.tokenize(text.encode(), add_bos=True, special=False) for text in json.load(sys.stdin)]
json.dump(tokens, sys.stdout)
