"""Alpaca's instructions and responses (Taori et al. 2023), with an end token after responses.

A user's turn that says what is instruction and what is input is written with both; of several turns each is an
instruction.
"""

from __future__ import annotations

from fedpeft.data.chat.templates.record import ChatTemplate

_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n"
)
_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\\n\\n"
)

ALPACA = ChatTemplate(
    "alpaca",
    "{{ bos_token or '' }}"
    "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}"
    f"{{% elif messages and messages[0]['input'] %}}{{{{ \"{_PAIRED}\" }}}}"
    f'{{% else %}}{{{{ "{_PLAIN}" }}}}{{% endif %}}'
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + (message['instruction'] or message['content']) + '\\n\\n' }}"
    "{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' }}{% endif %}"
    "{% elif not loop.first %}{{ raise_exception('a system turn must come first, and other roles have no name') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
)
