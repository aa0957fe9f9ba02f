"""Vicuna's conversations (version 1.1; Chiang et al. 2023): both speak on one line, answers have an end token."""

from __future__ import annotations

from fedpeft.data.chat.templates.record import ChatTemplate

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA = ChatTemplate(
    "vicuna",
    "{{ bos_token or '' }}"
    "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    f'{{% else %}}{{{{ "{_SYSTEM}" }}}}{{% endif %}}'
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ ' ASSISTANT:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ (' ' if loop.first or messages[loop.index0 - 1]['role'] != 'assistant' "
    "else '') + 'USER: ' + message['content'] }}"
    "{% elif not loop.first %}{{ raise_exception('a system turn must come first, and other roles have no name') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
)
