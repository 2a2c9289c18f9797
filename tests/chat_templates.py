"""Chat templates with the habits of well-known ones, in a few lines each."""

CHATML = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# Like Llama 3.1: writes the BOS, trims contents, shows tools and a date in the system message.
LLAMA = """
{{- bos_token -}}
<|start|>system<|end|>\n\nToday is {{ date_string | default('Monday') }}.
{%- if tools %} Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}{% endif -%}
{%- if messages[0].role == 'system' %} {{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif -%}
<|eot|>
{%- for message in messages -%}
<|start|>{{ message.role }}<|end|>\n\n{{ (message.content or message.tool_calls | tojson) | trim }}<|eot|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant<|end|>\n\n{% endif -%}
"""

# Like Qwen3: the last answer gets a (perhaps empty) block of thoughts, earlier answers lose theirs.
QWEN = """
{%- for message in messages -%}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set thoughts = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n')
    if '</think>' in message.content else '' -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last -%}
<think>
{{ thoughts }}
</think>

{% endif -%}
{{ content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""

# Like Qwen3-Thinking: the generation prompt opens the block that the whole conversation then closes.
THINKING = QWEN.replace("{% if enable_thinking is defined and not enable_thinking -%}", "<think>\n{% if false -%}")

# Like DeepSeek-R1: the generation prompt opens a block of thoughts that whole conversations do not have.
DEEPSEEK = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}<|start|>{{ message.content.split('</think>')[-1] }}<|eot|>
{%- else -%}<|end|>{{ message.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|><think>\n{% endif -%}
"""

# Marks whatever message is the last, so that a prompt reads differently once a response follows.
SHIFTING = CHATML.replace("{{ message.content }}", "{{ message.content }}{% if loop.last %} (last){% endif %}")

# Like those of models with tools: takes contents as text or parts, and arguments as objects or JSON of them.
TOOLS = """
{%- if tools %}<|start|>tools<|end|>{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|eot|>{% endif -%}
{%- for message in messages -%}
<|start|>{{ message.role }}{% if message.name %}={{ message.name }}{% endif %}<|end|>
{%- if message.content is string %}{{ message.content }}
{%- elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif -%}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }} {# -#}
{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}]{% endfor -%}
<|eot|>
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant<|end|>{% endif -%}
"""
