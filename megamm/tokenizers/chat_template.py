"""The chat template that travels with the tokenizer: what `tasks.template.encode` does, said in Jinja for transformers.

Whitespace control is explicit at every tag, because transformers' Jinja drops a newline after a block tag and the template's own line
breaks must never become tokens. One placeholder stands for a picture or a sound; the processor repeats it.
"""

TEMPLATE_VERSION = 2
"""Part of the tokenizer's fingerprint: planned lengths made under another template are made again."""

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] in ['text', 'label'] -%}
                {{- part['text'] -}}
            {%- elif part['type'] in ['image', 'audio'] -%}
                {{- '<|' + part['type'] + '_start|><|' + part['type'] + '|><|' + part['type'] + '_end|>' -}}
            {%- else -%}
                {{- raise_exception('part type ' + part['type'] + ' is not one of text, label, image, audio') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- if messages | length == 1 and messages[0]['role'] == 'assistant' -%}
    {%- generation -%}
        {{- render(messages[0]['content']) + '<|eos|>' -}}
    {%- endgeneration -%}
{%- else -%}
    {%- for message in messages -%}
        {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
            {{- raise_exception('role ' + message['role'] + ' is not one of system, user, assistant') -}}
        {%- endif -%}
        {{- '<|' + message['role'] + '|>' -}}
        {%- if message['role'] == 'assistant' -%}
            {%- generation -%}
                {{- render(message['content']) + '<|end|>' -}}
            {%- endgeneration -%}
        {%- else -%}
            {{- render(message['content']) + '<|end|>' -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if add_generation_prompt -%}
        {{- '<|assistant|>' -}}
    {%- endif -%}
{%- endif -%}
"""
